# Builds and runs the consumer in the folder KIND of tests/package, in the scratch folder SCRATCH.
#
#   cmake -DKIND=find_package -DSCRATCH=dir -DSOURCE=eigenblocks -DPREFIX=installed
#         -DCOMPILER=c++ -DWITH_IO=ON -P run.cmake
#
# WITH_IO says whether eigenblocks::io exists here: then a consumer of it must have been built.
cmake_minimum_required(VERSION 3.23)

set(kind_dir ${CMAKE_CURRENT_LIST_DIR}/${KIND})
file(REMOVE_RECURSE ${SCRATCH})
file(MAKE_DIRECTORY ${SCRATCH})

# run(COMMAND...): in the scratch folder; a failing command fails the test.
function(run)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${SCRATCH} COMMAND_ECHO STDOUT
                  COMMAND_ERROR_IS_FATAL ANY)
endfunction()

if(KIND STREQUAL pkg_config)
  run(${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${PREFIX}/share/pkgconfig CXX=${COMPILER}
      ${kind_dir}/build.sh)
else()
  run(${CMAKE_COMMAND} -S ${kind_dir} -B . -DCMAKE_CXX_COMPILER=${COMPILER}
      -DCMAKE_PREFIX_PATH=${PREFIX} -DEIGENBLOCKS_SOURCE=${SOURCE}
      -DFETCHCONTENT_SOURCE_DIR_EIGENBLOCKS=${SOURCE})
  run(${CMAKE_COMMAND} --build .)
endif()
run(${SCRATCH}/consumer)

if(WITH_IO AND KIND MATCHES "^(find_package|fetch_content)$")
  run(${SCRATCH}/consumer_io)
endif()

# A consumer inherits an include path, C++20 and Eigen; nothing of our tests or our flags.
if(EXISTS ${SCRATCH}/_deps/eigenblocks-build/tests OR EXISTS ${SCRATCH}/eigenblocks/tests)
  message(FATAL_ERROR "a consumer's build contains the tests of eigenblocks")
endif()
