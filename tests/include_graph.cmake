# Checks the include graph of include/eigenblocks, and that the umbrella header lists every block.
#
#   cmake -P tests/include_graph.cmake               check (this is the ctest entry include_graph)
#   cmake -DWRITE=ON -P tests/include_graph.cmake    rewrite the umbrella, then check
#
# Rules
#   1. A header includes only what the table `arrows` allows it; there are no cycles.
#   2. attention/reference.hpp, the oracle, reaches attention/kernel.hpp on no path: an oracle that
#      shares code with what it checks proves nothing.
#   3. Includes are written <eigenblocks/...> and name files that exist. Standard headers that cost
#      seconds or break on a supported compiler are refused; unsupported Eigen is core/fft's alone.
#   4. eigenblocks.hpp includes every header but those of io/, mpi/ and of folders named detail/.
cmake_minimum_required(VERSION 3.23)

# headers => headers they may include besides each other; the first row that fits counts.
set(arrows
    "^version.hpp$ => ^$"
    "^core/ => ^version.hpp$"
    "^nn/ => ^core/"
    "^quantize/ => ^core/"
    "^structured/ => ^core/"
    "^simplex/ => ^core/"
    "^density/ => ^core/"
    "^loss/ => ^core/"
    "^position/frequencies.hpp$ => ^core/"
    "^position/ => ^(core|nn|position)/"
    "^attention/(mha|mla|vq|hwfa|linear)(_.*)?.hpp$ => ^(core|nn|quantize|position|attention)/"
    "^attention/ => ^(core|nn|position)/"
    "^ssm/hippo.hpp$ => ^core/"
    "^ssm/ => ^(core|nn|structured|ssm)/"
    "^token/trie.hpp$ => ^core/"
    "^token/unigram_(model|weights).hpp$ => ^(core/|token/trie.hpp$)"
    "^token/lattice.hpp$ => ^(core/|token/(trie|unigram_(model|weights)).hpp$)"
    "^token/ => ^(core|token)/"
    "^optim/ => ^(core|structured)/"
    "^adapter/ => ^(core|nn|structured)/"
    "^vision/ => ^(core|nn)/"
    "^io/ => ^(core|nn|token)/"
    "^mpi/ => ^(core|attention|ssm)/"
    "^eigenblocks.hpp$ => .")
set(refused "^(iostream|regex|ranges|format|source_location|execution|Eigen/Dense|Eigen/src/.*)$")

if(NOT DEFINED INCLUDE_DIR)
  set(INCLUDE_DIR ${CMAKE_CURRENT_LIST_DIR}/../include)
endif()
set(base ${INCLUDE_DIR}/eigenblocks)
file(GLOB_RECURSE headers RELATIVE ${base} ${base}/*.hpp)
list(SORT headers)
set(faults "")

# Rule 4. The list is grouped by folder, so that a reader sees the areas.
set(blocks ${headers})
list(FILTER blocks EXCLUDE REGEX "^eigenblocks.hpp$|^(io|mpi)/|(^|/)detail/")
set(umbrella [[
// Everything in eigenblocks that needs no more than Eigen. What needs other libraries, eigenblocks/io
// and eigenblocks/mpi, is included by its own name.
//
// Written by `cmake -DWRITE=ON -P tests/include_graph.cmake`; a test keeps it complete.
#pragma once
]])
set(previous_folder "none")
foreach(header IN LISTS blocks)
  cmake_path(GET header PARENT_PATH folder)
  if(NOT folder STREQUAL previous_folder)
    string(APPEND umbrella "\n")
    set(previous_folder "${folder}")
  endif()
  string(APPEND umbrella "#include <eigenblocks/${header}>\n")
endforeach()
if(WRITE)
  file(WRITE ${base}/eigenblocks.hpp "${umbrella}")
endif()
file(READ ${base}/eigenblocks.hpp present)
if(NOT present STREQUAL umbrella)
  list(APPEND faults "eigenblocks.hpp is not the list of all blocks: write it anew with
      cmake -DWRITE=ON -P tests/include_graph.cmake")
endif()

# find_row(HEADER ROW ALLOWED): the row of the table that a header belongs to.
function(find_row header row allowed)
  foreach(arrow IN LISTS arrows)
    string(REGEX MATCH "^(.*) => (.*)$" arrow "${arrow}")
    set(pattern "${CMAKE_MATCH_1}")
    set(targets "${CMAKE_MATCH_2}")
    if(header MATCHES "${pattern}")
      set(${row} "${pattern}" PARENT_SCOPE)
      set(${allowed} "${targets}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${row} "" PARENT_SCOPE)
endfunction()

# Rules 1 and 3, and the graph itself: includes_<header> for the two checks that follow.
foreach(header IN LISTS headers)
  find_row(${header} row allowed)
  if(row STREQUAL "")
    list(APPEND faults "${header} is in no row of the table in tests/include_graph.cmake")
    continue()
  endif()
  set(includes_${header} "")
  file(STRINGS ${base}/${header} lines REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "<([^>]+)>")
      list(APPEND faults "${header}: write ${line} with <eigenblocks/...>")
      continue()
    endif()
    set(target "${CMAKE_MATCH_1}")
    if(target MATCHES "${refused}" OR
       (target MATCHES "^unsupported/" AND NOT header MATCHES "^core/fft"))
      list(APPEND faults "${header} includes <${target}>, which a public header may not")
    elseif(target MATCHES "^eigenblocks/(.+)$")
      set(target "${CMAKE_MATCH_1}")
      list(APPEND includes_${header} ${target})
      find_row(${target} target_row unused)
      if(NOT target IN_LIST headers)
        list(APPEND faults "${header} includes eigenblocks/${target}, which does not exist")
      elseif(NOT (target_row STREQUAL row OR target MATCHES "${allowed}"))
        list(APPEND faults "${header} may not include ${target}")
      endif()
    endif()
  endforeach()
endforeach()

# Rule 1, cycles: take away headers all of whose includes are taken away, until none is left.
set(waiting ${headers})
set(progress TRUE)
while(waiting AND progress)
  set(progress FALSE)
  foreach(header IN LISTS waiting)
    set(blocked FALSE)
    foreach(target IN LISTS includes_${header})
      if(target IN_LIST waiting)
        set(blocked TRUE)
        break()
      endif()
    endforeach()
    if(NOT blocked)
      list(REMOVE_ITEM waiting ${header})
      set(progress TRUE)
    endif()
  endforeach()
endwhile()
if(waiting)
  list(JOIN waiting ", " text)
  list(APPEND faults "these headers include each other in a circle, or sit above one: ${text}")
endif()

# Rule 2.
set(reached "attention/reference.hpp")
set(frontier ${reached})
while(frontier)
  list(POP_FRONT frontier header)
  foreach(target IN LISTS includes_${header})
    if(NOT target IN_LIST reached)
      list(APPEND reached ${target})
      list(APPEND frontier ${target})
    endif()
  endforeach()
endwhile()
if("attention/kernel.hpp" IN_LIST reached)
  list(APPEND faults "attention/reference.hpp reaches attention/kernel.hpp")
endif()

list(LENGTH headers count)
if(faults)
  list(JOIN faults "\n  " text)
  message(FATAL_ERROR "include graph of ${count} headers:\n  ${text}")
endif()
message(STATUS "include graph of ${count} headers: every rule holds")
