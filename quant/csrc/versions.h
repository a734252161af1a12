// Functions in versions for wider vectors, chosen when the library is loaded: #define VECTOR VERSIONS("avx2").

#pragma once

#if !defined(BITGRID_PLAIN) && defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VERSIONS(...) __attribute__((target_clones(__VA_ARGS__, "default")))
#else
#define VERSIONS(...)
#endif
// Into every version, or it would be compiled once for the narrowest vectors.
#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
