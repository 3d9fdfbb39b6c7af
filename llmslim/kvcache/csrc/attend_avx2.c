#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)
#pragma GCC target("avx2,fma")
#define MACHINE(name) name##_avx2
#define SIZE 256   /* bits of its registers */
#include "attend_loops.h"
#endif
