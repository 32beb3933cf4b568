# Runs one file of tests/fail: it must compile as it is, and must not with EIGENBLOCKS_FAIL defined.
# The compiler's words must then match the pattern after `expect:` in the file, so that a file which
# fails for another reason than the one it is about is caught.
#
#   cmake -DSOURCE=file.cpp -DCOMPILER=c++ -DINCLUDES="dir;dir" -P check.cmake
cmake_minimum_required(VERSION 3.23)

list(TRANSFORM INCLUDES PREPEND "-isystem")
set(command ${CMAKE_COMMAND} -E env LC_ALL=C
    ${COMPILER} -std=c++20 -fsyntax-only ${INCLUDES} ${SOURCE})

file(STRINGS ${SOURCE} expectation REGEX "^// expect: ")
string(REPLACE "// expect: " "" expectation "${expectation}")
if(expectation STREQUAL "")
  message(FATAL_ERROR "${SOURCE} has no line `// expect: PATTERN`")
endif()

execute_process(COMMAND ${command} RESULT_VARIABLE status ERROR_VARIABLE text)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "the good half does not compile:\n${text}")
endif()

execute_process(COMMAND ${command} -DEIGENBLOCKS_FAIL RESULT_VARIABLE status ERROR_VARIABLE text)
if(status EQUAL 0)
  message(FATAL_ERROR "the bad half compiles")
endif()
if(NOT text MATCHES "${expectation}")
  message(FATAL_ERROR "the bad half fails, but not with `${expectation}`:\n${text}")
endif()
