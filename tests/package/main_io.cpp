// A user of eigenblocks::io: compiles and links against its two dependencies.
#include <eigenblocks/io/safetensors.hpp>

int main() { return 0; }
