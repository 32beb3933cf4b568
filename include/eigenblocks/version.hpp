// The version of eigenblocks, and its only source: CMakeLists.txt parses the three numbers below.
//
// Source compatibility follows SemVer; before 1.0 a minor release may change it. There is no ABI
// promise, because the library is header-only. Test a version with
//   #if EIGENBLOCKS_VERSION_AT_LEAST(0, 1, 0)
#pragma once

#define EIGENBLOCKS_VERSION_MAJOR 0
#define EIGENBLOCKS_VERSION_MINOR 1
#define EIGENBLOCKS_VERSION_PATCH 0
#define EIGENBLOCKS_VERSION_STRING "0.1.0"

// True when this library is release x.y.z or newer.
#define EIGENBLOCKS_VERSION_AT_LEAST(x, y, z) \
  (EIGENBLOCKS_VERSION_MAJOR > (x) ||         \
   (EIGENBLOCKS_VERSION_MAJOR == (x) &&       \
    (EIGENBLOCKS_VERSION_MINOR > (y) ||       \
     (EIGENBLOCKS_VERSION_MINOR == (y) && EIGENBLOCKS_VERSION_PATCH >= (z)))))
