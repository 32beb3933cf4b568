// The main function of every doctest program. It is compiled once and linked into each of them.
#define DOCTEST_CONFIG_IMPLEMENT  // by itself too: the precompiled header has read doctest.h without
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
