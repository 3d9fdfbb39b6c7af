/* One query per sequence over a packed KV cache: plain C, called through ctypes (see ../native.py).
 *
 * Keys of a block of T tokens lie channel by channel, [D, T * bits / 8]; values token by token, [T, D * bits / 8];
 * how a row is packed is in ../planes.py. A block is expanded to float32 in a tile that stays in the nearest cache,
 * once for all queries of the heads that share it, and goes through one running softmax: with `top` the greatest
 * score so far, a block of scores s adds exp(s - top) to `total` and exp(s - top) v to `out`.
 *
 * The loops are written with 16 floats at a time, which the compiler puts in what registers there are: they are
 * compiled for AVX-512, AVX2 and any machine, and chosen when the program runs. Threads as in packed.c: compiled
 * with -fopenmp but not linked to a runtime, so torch's is used. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"       /* no wide vector is passed: all that takes one is inlined */
#endif
#define INLINE static inline __attribute__((always_inline))
enum { LANES = 16, ROWS = 4 };                 /* ROWS: queries that share a load of the tile */
enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { PER_CHANNEL = 1, PER_TOKEN = 2, ROTATED = 3 };

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

typedef struct {
    int64_t batch, heads, queries;             /* queries: heads of the model per head of the cache */
    int64_t key_dim, value_dim, block, bits;
    int64_t key_kind, value_kind, key_group, value_group;
    int64_t mask_stride;                       /* bytes from one sequence's mask to the next; 0: one for all */
    float softcap;                             /* 0: none */
} Shape;

typedef struct { const uint8_t *codes; const uint16_t *scale, *low; } Store;

typedef struct {
    const float *query;                        /* [batch, heads, queries, key_dim], scaled */
    const uint8_t *mask;                       /* [batch or 1, tokens], 1: look at it; NULL: at all */
    float *top, *total, *out;                  /* [batch, heads, queries], the same, [.., value_dim] */
} State;

/* ---- numbers ---- */

INLINE float from_float16(uint16_t half) {
    union { uint32_t bits; float value; } x = {(uint32_t)(half & 0x7fff) << 13};
    x.value *= 0x1p112f;                       /* moves the exponent, subnormals too; there is no infinity here */
    x.bits |= (uint32_t)(half & 0x8000) << 16;
    return x.value;
}

INLINE float from_bfloat16(uint16_t half) {
    union { uint32_t bits; float value; } x = {(uint32_t)half << 16};
    return x.value;
}

INLINE Floats load(const float *at) { return *(const Floats *)at; }
INLINE void store(float *at, Floats x) { *(Floats *)at = x; }

INLINE Floats load_any(const void *data, int64_t index, int64_t kind) {
    if (kind == FLOAT32) return load((const float *)data + index);
    Ints bits = __builtin_convertvector(*(const Halves *)((const uint16_t *)data + index), Ints) << 16;
    return (Floats)bits;
}

/* e^x for x <= 0; below -87 it is e^-87, which is nothing beside the 1 of the greatest score. Error 2e-7. */
INLINE Floats exponential(Floats x) {
    const Floats magic = (Floats){} + 12582912.0f, least = (Floats){} - 87.0f;
    Ints below = x < least;
    x = (Floats)((below & (Ints)least) | (~below & (Ints)x));
    Floats whole = x * 1.44269504f + magic;
    Ints power = (Ints)whole << 23;
    whole -= magic;
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Floats)((Ints)p + power);
}

/* ---- expansion of a block to float32 ---- */

INLINE void unpack(const uint8_t *row, int64_t n, int bits, uint8_t *codes) {
    if (bits == 8) {
        memcpy(codes, row, n);
    } else if (bits == 4) {
        int64_t m = n / 2;
        for (int64_t j = 0; j < m; j++) codes[j] = row[j] & 15;
        for (int64_t j = 0; j < m; j++) codes[m + j] = row[j] >> 4;
    } else {
        int64_t m = n / 4, k = n / 8;
        for (int i = 0; i < 4; i++)
            for (int64_t j = 0; j < m; j++) codes[i * m + j] = (row[j] >> (2 * i)) & 3;
        if (bits == 3)
            for (int i = 0; i < 8; i++)
                for (int64_t j = 0; j < k; j++) codes[i * k + j] |= ((row[m + j] >> i) & 1) << 2;
    }
}

INLINE void affine(const uint8_t *codes, int64_t n, float scale, float low, float *out) {
    for (int64_t j = 0; j < n; j++) out[j] = (float)codes[j] * scale + low;
}

/* One row of n codes of rotated tokens, with one size for all of them or one each. */
INLINE void look_up(const uint8_t *codes, int64_t n, const float *levels, const float *size, int64_t each, float *out) {
    for (int64_t j = 0; j < n; j++) out[j] = levels[codes[j]] * size[each ? j : 0];
}

/* keys [D, T] of one block */
INLINE void expand_keys(const Shape *s, Store from, const float *levels, int64_t at, int bits, uint8_t *codes,
                        float *scale, float *tile) {
    const int64_t T = s->block, D = s->key_dim, row = T * bits / 8;
    const uint8_t *packed = from.codes + at * D * row;
    const int64_t groups = s->key_kind == PER_TOKEN ? D / s->key_group : 1;
    if (s->key_kind == ROTATED)
        for (int64_t t = 0; t < T; t++) scale[t] = from_float16(from.scale[at * T + t]);
    if (s->key_kind == PER_CHANNEL)
        for (int64_t d = 0; d < D; d++) {
            scale[d] = from_float16(from.scale[at * D + d]);
            scale[D + d] = from_float16(from.low[at * D + d]);
        }
    for (int64_t d = 0; d < D; d++) {
        unpack(packed + d * row, T, bits, codes);
        float *out = tile + d * T;
        if (s->key_kind == PER_CHANNEL) {
            affine(codes, T, scale[d], scale[D + d], out);
        } else if (s->key_kind == ROTATED) {
            look_up(codes, T, levels, scale, 1, out);
        } else {
            if (d % s->key_group == 0) {
                const int64_t first = (at * groups + d / s->key_group) * T;
                for (int64_t t = 0; t < T; t++) {
                    scale[t] = from_float16(from.scale[first + t]);
                    scale[T + t] = from_float16(from.low[first + t]);
                }
            }
            for (int64_t t = 0; t < T; t++) out[t] = (float)codes[t] * scale[t] + scale[T + t];
        }
    }
}

/* values [T, D] of one block */
INLINE void expand_values(const Shape *s, Store from, const float *levels, int64_t at, int bits, uint8_t *codes,
                          float *tile) {
    const int64_t T = s->block, D = s->value_dim, row = D * bits / 8;
    const uint8_t *packed = from.codes + at * T * row;
    const int64_t groups = s->value_kind == PER_TOKEN ? D / s->value_group : 1;
    for (int64_t t = 0; t < T; t++) {
        unpack(packed + t * row, D, bits, codes);
        float *out = tile + t * D;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t i = (at * T + t) * groups + g;
            const float scale = from_float16(from.scale[i]);
            if (s->value_kind == ROTATED) look_up(codes, D, levels, &scale, 0, out);
            else affine(codes + g * s->value_group, D / groups, scale, from_float16(from.low[i]), out + g * s->value_group);
        }
    }
}

/* ---- attention over a tile ---- */

/* score[r][t] = sum_d query[r][d] key[d][t]; n is a multiple of 8 and reads may go LANES past it */
INLINE void scores_of(const float *query, int64_t D, const float *tile, int64_t T, const int rows, float *score,
                      int64_t stride) {
    for (int64_t t = 0; t < T; t += 2 * LANES) {
        Floats a[ROWS], b[ROWS];
        for (int r = 0; r < rows; r++) a[r] = b[r] = (Floats){};
        for (int64_t d = 0; d < D; d++) {
            Floats x = load(tile + d * T + t), y = load(tile + d * T + t + LANES);
            for (int r = 0; r < rows; r++) a[r] += x * query[r * D + d], b[r] += y * query[r * D + d];
        }
        for (int r = 0; r < rows; r++) {
            store(score + r * stride + t, a[r]);
            store(score + r * stride + t + LANES, b[r]);
        }
    }
}

/* out[r][d] += sum_t weight[r][t] value[t][d]; `out` has room for whole lanes */
INLINE void add_values(const float *weight, int64_t stride, const float *tile, int64_t T, int64_t step, int64_t D,
                       const int rows, float *out, int64_t width) {
    for (int64_t d = 0; d < D; d += 2 * LANES) {
        Floats a[ROWS], b[ROWS];
        for (int r = 0; r < rows; r++) a[r] = load(out + r * width + d), b[r] = load(out + r * width + d + LANES);
        for (int64_t t = 0; t < T; t++) {
            Floats x = load(tile + t * step + d), y = load(tile + t * step + d + LANES);
            for (int r = 0; r < rows; r++) a[r] += x * weight[r * stride + t], b[r] += y * weight[r * stride + t];
        }
        for (int r = 0; r < rows; r++) {
            store(out + r * width + d, a[r]);
            store(out + r * width + d + LANES, b[r]);
        }
    }
}

/* Scores of `valid` tokens become weights, in whole lanes, after `out` and `total` were faded. 0: nothing is seen. */
INLINE int weigh(float *score, int64_t valid, int64_t padded, const uint8_t *mask, float softcap, float *top,
                 float *total, float *out, int64_t width) {
    if (softcap != 0)
        for (int64_t t = 0; t < padded; t += LANES) {   /* tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|) */
            Floats x = load(score + t) / softcap;
            Ints sign = (Ints)x & INT32_MIN;
            Floats e = exponential(-2 * (Floats)((Ints)x & INT32_MAX));
            store(score + t, (Floats)((Ints)((1 - e) / (1 + e) * softcap) | sign));
        }
    for (int64_t t = valid; t < padded; t++) score[t] = -INFINITY;
    if (mask)
        for (int64_t t = 0; t < valid; t++) score[t] = mask[t] ? score[t] : -INFINITY;
    Floats most = load(score);
    for (int64_t t = LANES; t < padded; t += LANES) {
        Floats x = load(score + t);
        Ints more = x > most;
        most = (Floats)((more & (Ints)x) | (~more & (Ints)most));
    }
    float greatest = *top;
    for (int i = 0; i < LANES; i++) greatest = most[i] > greatest ? most[i] : greatest;
    if (greatest == -INFINITY) {
        memset(score, 0, padded * sizeof(float));
        return 0;
    }
    if (greatest > *top) {
        const float fade = expf(*top - greatest);
        for (int64_t d = 0; d < width; d++) out[d] *= fade;
        *total *= fade;
        *top = greatest;
    }
    Floats sum = {};
    for (int64_t t = 0; t < padded; t += LANES) {
        Floats x = load(score + t);
        Ints seen = x > -INFINITY;
        Floats w = (Floats)(seen & (Ints)exponential(x - greatest));
        store(score + t, w);
        sum += w;
    }
    for (int i = 0; i < LANES; i++) *total += sum[i];
    return 1;
}

INLINE int64_t up(int64_t n) { return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

typedef struct { float *keys, *values, *score, *out, *scale; uint8_t *codes; void *memory; } Scratch;

static Scratch allocate(const Shape *s) {
    const int64_t T = s->block, D = s->key_dim > s->value_dim ? s->key_dim : s->value_dim, wide = T > D ? T : D;
    const int64_t tile = T * D + 4 * LANES, out = s->queries * up(s->value_dim), score = s->queries * up(T);
    Scratch x;
    /* what lanes read beyond the last row of a tile must be numbers */
    x.memory = calloc(1, (2 * tile + out + score + 2 * wide) * sizeof(float) + wide + 64);
    if (!x.memory) return x;
    x.keys = (float *)(((uintptr_t)x.memory + 63) & ~(uintptr_t)63);
    x.values = x.keys + tile;
    x.score = x.values + tile;
    x.out = x.score + score;
    x.scale = x.out + out;
    x.codes = (uint8_t *)(x.scale + 2 * wide);
    return x;
}

INLINE void take_out(const Shape *s, const State *state, int64_t head, float *out, int back) {
    const int64_t D = s->value_dim, width = up(D);
    for (int64_t r = 0; r < s->queries; r++) {
        float *outside = state->out + (head * s->queries + r) * D;
        if (back) memcpy(outside, out + r * width, D * sizeof(float));
        else memcpy(out + r * width, outside, D * sizeof(float));
    }
}

#define BY_ROWS(rows, call) \
    switch (rows) { \
    case 1: { const int R = 1; call; } break; \
    case 2: { const int R = 2; call; } break; \
    case 3: { const int R = 3; call; } break; \
    default: { const int R = 4; call; } \
    }

INLINE void packed_head(const Shape *s, Store keys, Store values, const float *levels, int64_t blocks, int64_t tokens,
                        const State *state, int64_t head, const int bits, const Scratch *x) {
    const int64_t T = s->block, D = s->key_dim, V = s->value_dim, padded = up(T), width = up(V);
    const uint8_t *mask = state->mask ? state->mask + head / s->heads * s->mask_stride : NULL;
    const float *query = state->query + head * s->queries * D;
    take_out(s, state, head, x->out, 0);
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t left = tokens - i * T, valid = left < T ? left : T;
        int any = 0;
        expand_keys(s, keys, levels, head * blocks + i, bits, x->codes, x->scale, x->keys);
        for (int64_t r = 0; r < s->queries; r += ROWS)
            BY_ROWS(s->queries - r, scores_of(query + r * D, D, x->keys, T, R, x->score + r * padded, padded))
        for (int64_t r = 0; r < s->queries; r++)
            any |= weigh(x->score + r * padded, valid, padded, mask ? mask + i * T : NULL, s->softcap,
                         state->top + head * s->queries + r, state->total + head * s->queries + r,
                         x->out + r * width, V);
        if (!any) continue;
        expand_values(s, values, levels, head * blocks + i, bits, x->codes, x->values);
        for (int64_t r = 0; r < s->queries; r += ROWS)
            BY_ROWS(s->queries - r, add_values(x->score + r * padded, padded, x->values, T, V, V, R,
                                               x->out + r * width, width))
    }
    take_out(s, state, head, x->out, 1);
}

/* Tokens as they are: keys and values [tokens, D] of one kind. Steps are in numbers, not bytes. */
INLINE void plain_head(const Shape *s, const char *keys, int64_t key_step, const char *values, int64_t value_step,
                       int64_t kind, int64_t tokens, const State *state, int64_t head, const Scratch *x) {
    const int64_t T = s->block, D = s->key_dim, V = s->value_dim, padded = up(T), width = up(V);
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    const uint8_t *mask = state->mask ? state->mask + head / s->heads * s->mask_stride : NULL;
    const float *query = state->query + head * s->queries * D;
    take_out(s, state, head, x->out, 0);
    for (int64_t first = 0; first < tokens; first += T) {
        const int64_t valid = tokens - first < T ? tokens - first : T;
        for (int64_t t = 0; t < valid; t++) {
            const char *row = keys + (first + t) * key_step * size;
            for (int64_t r = 0; r < s->queries; r++) {
                Floats sum = {};
                float dot = 0;
                int64_t d = 0;
                for (; d + LANES <= D; d += LANES) sum += load_any(row, d, kind) * load(query + r * D + d);
                for (; d < D; d++)
                    dot += query[r * D + d]
                        * (kind == FLOAT32 ? ((const float *)row)[d] : from_bfloat16(((const uint16_t *)row)[d]));
                for (int i = 0; i < LANES; i++) dot += sum[i];
                x->score[r * padded + t] = dot;
            }
        }
        int any = 0;
        for (int64_t r = 0; r < s->queries; r++)
            any |= weigh(x->score + r * padded, valid, padded, mask ? mask + first : NULL, s->softcap,
                         state->top + head * s->queries + r, state->total + head * s->queries + r,
                         x->out + r * width, V);
        if (!any) continue;
        for (int64_t t = 0; t < valid; t++) {
            const char *row = values + (first + t) * value_step * size;
            for (int64_t d = 0; d < V; d++)
                x->values[t * V + d] =
                    kind == FLOAT32 ? ((const float *)row)[d] : from_bfloat16(((const uint16_t *)row)[d]);
        }
        for (int64_t r = 0; r < s->queries; r += ROWS)
            BY_ROWS(s->queries - r, add_values(x->score + r * padded, padded, x->values, valid, V, V, R,
                                               x->out + r * width, width))
    }
    take_out(s, state, head, x->out, 1);
}

INLINE void packed_bits(const Shape *s, Store keys, Store values, const float *levels, int64_t blocks, int64_t tokens,
                       const State *state, int64_t head, const Scratch *x) {
    switch (s->bits) {
    case 2: packed_head(s, keys, values, levels, blocks, tokens, state, head, 2, x); break;
    case 3: packed_head(s, keys, values, levels, blocks, tokens, state, head, 3, x); break;
    case 4: packed_head(s, keys, values, levels, blocks, tokens, state, head, 4, x); break;
    default: packed_head(s, keys, values, levels, blocks, tokens, state, head, 8, x);
    }
}

#define MACHINE(name, target) \
    target static void packed_##name(const Shape *s, Store keys, Store values, const float *levels, int64_t blocks, \
                                     int64_t tokens, const State *state, int64_t head, const Scratch *x) { \
        packed_bits(s, keys, values, levels, blocks, tokens, state, head, x); \
    } \
    target static void plain_##name(const Shape *s, const char *keys, int64_t key_step, const char *values, \
                                    int64_t value_step, int64_t kind, int64_t tokens, const State *state, \
                                    int64_t head, const Scratch *x) { \
        if (kind == FLOAT32) plain_head(s, keys, key_step, values, value_step, FLOAT32, tokens, state, head, x); \
        else plain_head(s, keys, key_step, values, value_step, BFLOAT16, tokens, state, head, x); \
    }

MACHINE(any, )
#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)   /* -DPORTABLE: to test the other */
MACHINE(avx2, __attribute__((target("avx2,fma"))))
MACHINE(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))))
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
#define CHOOSE(kind, ...) kind##_any(__VA_ARGS__)
#endif

/* ---- entry points: 0, or -1 when there is no memory ---- */

int llmslim_attend_packed(const Shape *s, const State *state, const uint8_t *key_codes, const uint16_t *key_scale,
                          const uint16_t *key_low, const uint8_t *value_codes, const uint16_t *value_scale,
                          const uint16_t *value_low, const float *levels, int64_t blocks, int64_t tokens,
                          int threads) {
    const Store keys = {key_codes, key_scale, key_low}, values = {value_codes, value_scale, value_low};
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t head = 0; head < s->batch * s->heads; head++) {
        Scratch x = allocate(s);
        if (!x.memory) { failed = -1; continue; }
        CHOOSE(packed, s, keys, values, levels, blocks, tokens, state, head, &x)
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
