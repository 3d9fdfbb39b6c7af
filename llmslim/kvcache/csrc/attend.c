/* One query per sequence over a packed KV cache: plain C, called through ctypes (see ../runtime/native.py).
 *
 * Keys of a block of T tokens lie channel by channel, [D, T * bits / 8]; values token by token, [T, D * bits / 8];
 * how a row is packed is in ../planes.py. Keys in components have rows of T * width / 8, width each one's own. A block is expanded to float32 in a tile that stays in the nearest cache,
 * once for all queries of the heads that share it, and goes through one running softmax: with `top` the greatest
 * score so far, a block of scores s adds exp(s - top) to `total` and exp(s - top) v to `out`.
 *
 * The loops (attend_loops.h) are compiled for AVX-512, AVX2 and any machine, and chosen when the program runs.
 * Threads as in packed.c: compiled with -fopenmp but not linked to a runtime, so torch's is used. */
#include "attend.h"

#ifdef HAVE_X86
static int machine(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#define CHOOSE(kind, ...) \
    switch (machine()) { \
    case 2: kind##_avx512(__VA_ARGS__); break; \
    case 1: kind##_avx2(__VA_ARGS__); break; \
    default: kind##_any(__VA_ARGS__); \
    }
#else
#define CHOOSE(kind, ...) kind##_any(__VA_ARGS__);
#endif

/* ---- entry points: 0, or -1 when there is no memory ---- */

int llmslim_attend_packed(const Shape *s, const State *state, const Store *keys, const Store *values, int64_t blocks,
                          int64_t tokens, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t head = 0; head < s->batch * s->heads; head++) {
        Scratch x = allocate(s);
        if (!x.memory) { failed = -1; continue; }
        CHOOSE(packed, s, *keys, *values, blocks, tokens, state, head, &x)
        free(x.memory);
    }
    return failed;
}

int llmslim_attend_plain(const Shape *s, const State *state, const char *keys, const int64_t *key_steps,
                         const char *values, const int64_t *value_steps, int64_t kind, int64_t tokens, int threads) {
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t head = 0; head < s->batch * s->heads; head++) {
        const int64_t b = head / s->heads, h = head % s->heads;
        Scratch x = allocate(s);
        if (!x.memory) { failed = -1; continue; }
        CHOOSE(plain, s, keys + (b * key_steps[0] + h * key_steps[1]) * size, key_steps[2],
               values + (b * value_steps[0] + h * value_steps[1]) * size, value_steps[2], kind, tokens, state, head, &x)
        free(x.memory);
    }
    return failed;
}
