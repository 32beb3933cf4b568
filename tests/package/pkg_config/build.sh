#!/bin/sh
# An installed eigenblocks without CMake. The compiler comes as $CXX, and PKG_CONFIG_PATH names
# <where it was installed>/share/pkgconfig.
set -eu
${CXX:-c++} -std=c++20 -o consumer "$(dirname "$0")/../main.cpp" $(pkg-config --cflags eigenblocks)
