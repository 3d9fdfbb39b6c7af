/* What the loops of all machines and the entry points share. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
enum { WIDEST = 32, ROWS = 4 };                /* floats that any loop takes at a time; queries that share a load */
enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { PER_CHANNEL = 1, PER_TOKEN = 2, ROTATED = 3 };

typedef struct {
    int64_t batch, heads, queries;             /* queries: heads of the model per head of the cache */
    int64_t key_dim, value_dim, block, key_bits, value_bits;
    int64_t key_kind, value_kind, key_group, value_group;
    int64_t mask_stride;                       /* bytes from one sequence's mask to the next; 0: one for all */
    float softcap;                             /* 0: none */
} Shape;

typedef struct {
    const uint8_t *codes;
    const uint16_t *scale, *low;               /* rotated: the sizes and the means */
    const float *levels;                       /* rotated: what the codes mean */
    const uint8_t *widths;                     /* bits of each component, [heads, D]; NULL: all alike. The levels of w
                                                  bits then begin at 16 w, and those of 8 at 80 */
} Store;

typedef struct {
    const float *query;                        /* [batch, heads, queries, key_dim], scaled */
    const uint8_t *mask;                       /* [batch or 1, tokens], 1: look at it; NULL: at all */
    float *top, *total, *out;                  /* [batch, heads, queries], the same, [.., value_dim] */
} State;

/* ---- memory of a thread ---- */

INLINE int64_t up(int64_t n) { return (n + WIDEST - 1) / WIDEST * WIDEST; }

typedef struct { float *keys, *values, *score, *out, *scale, *low; uint8_t *codes; void *memory; } Scratch;

INLINE Scratch allocate(const Shape *s) {
    const int64_t T = s->block, D = s->key_dim > s->value_dim ? s->key_dim : s->value_dim, wide = T > D ? T : D;
    const int64_t tile = T * D + 2 * WIDEST, out = s->queries * up(s->value_dim), score = s->queries * up(T);
    const int64_t scales = T * D / 8 + 2 * up(wide);   /* no group has less than 8 codes; two rows when rotated */
    Scratch x;
    /* what lanes read beyond the last row of a tile must be numbers */
    x.memory = calloc(1, (2 * tile + out + score + 2 * scales) * sizeof(float) + wide + 64);
    if (!x.memory) return x;
    x.keys = (float *)(((uintptr_t)x.memory + 63) & ~(uintptr_t)63);
    x.values = x.keys + tile;
    x.score = x.values + tile;
    x.out = x.score + score;
    x.scale = x.out + out;
    x.low = x.scale + scales;
    x.codes = (uint8_t *)(x.low + scales);
    return x;
}

/* The tokens of some pages, for one head of the cache. */
#define PACKED(name) \
    void name(const Shape *s, Store keys, Store values, int64_t blocks, int64_t tokens, const State *state, \
              int64_t head, const Scratch *x)
/* Tokens as they are: keys and values [tokens, D] of one kind. Steps are in numbers, not bytes. */
#define PLAIN(name) \
    void name(const Shape *s, const char *keys, int64_t key_step, const char *values, int64_t value_step, \
              int64_t kind, int64_t tokens, const State *state, int64_t head, const Scratch *x)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)   /* -DPORTABLE: to test the other */
#define HAVE_X86 1
#endif
#pragma GCC visibility push(hidden)
PACKED(packed_any);
PLAIN(plain_any);
PACKED(packed_avx2);
PLAIN(plain_avx2);
PACKED(packed_avx512);
PLAIN(plain_avx512);
#pragma GCC visibility pop
