#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#define MACHINE(name) name##_avx512
#define SIZE 512   /* bits of its registers */
#include "attend_loops.h"
#endif
