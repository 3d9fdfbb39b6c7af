/* The loops, with vectors as wide as the machine's registers: of wider ones GCC makes poor code. A file for each machine
 * includes them after it has chosen the machine. */
#include "attend.h"
#if SIZE > 128
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"       /* no wide vector is passed: all that takes one is inlined */
#endif

enum { LANES = SIZE / 32 };
typedef float Floats __attribute__((vector_size(SIZE / 8), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(SIZE / 8), aligned(4), may_alias));

/* Bytes or shorts as lanes of 32 bits: by hand, since the compiler takes them one by one. */
#if SIZE == 512
INLINE Ints load_bytes(const uint8_t *at) { return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); }
INLINE Ints load_shorts(const uint16_t *at) { return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)); }
#elif SIZE == 256
INLINE Ints load_bytes(const uint8_t *at) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)); }
INLINE Ints load_shorts(const uint16_t *at) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)); }
#else
INLINE Ints load_bytes(const uint8_t *at) { return (Ints){at[0], at[1], at[2], at[3]}; }
INLINE Ints load_shorts(const uint16_t *at) { return (Ints){at[0], at[1], at[2], at[3]}; }
#endif

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
    return (Floats)(load_shorts((const uint16_t *)data + index) << 16);
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

/* Any row, code by code. */
INLINE void unpack(const uint8_t *row, int64_t n, int bits, uint8_t *codes) {
    const int width = bits == 3 ? 2 : bits;
    const int64_t m = n * width / 8, k = n / 8;
    for (int64_t j = 0; j < n; j++) codes[j] = (row[j % m] >> (j / m * width)) & (uint8_t)((1 << width) - 1);
    if (bits == 3)
        for (int64_t j = 0; j < n; j++) codes[j] |= ((row[m + j % k] >> (j / k)) & 1) << 2;
}

/* Whether every run of a row is whole lanes. */
INLINE int is_wide(int64_t n, int bits) {
    return bits == 3 ? n == 64 || n % (LANES * 8) == 0 : n % (LANES * 8 / bits) == 0;
}

/* Codes j .. j + 15 of run i of a wide row: as lanes of 32 bits. */
INLINE Ints codes_of(const uint8_t *row, int64_t n, const int bits, int64_t i, int64_t j) {
    if (bits == 8) return load_bytes(row + j);
    if (bits == 4) return (load_bytes(row + j) >> (int)(4 * i)) & 15;
    if (bits == 1) return (load_bytes(row + j) >> (int)i) & 1;
    Ints low = (load_bytes(row + j) >> (int)(2 * i)) & 3;
    if (bits == 2) return low;
    const uint8_t *high = row + n / 4;
    const int64_t k = n / 8;
    if (k >= LANES) return low | ((load_bytes(high + j % k) >> (int)(2 * i + j / k)) & 1) << 2;
#if SIZE == 512
    uint8_t twice[LANES];                      /* 8 bytes have the high bits of 16 codes twice over */
    memcpy(twice, high, 8), memcpy(twice + 8, high, 8);
    const Ints half = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    return low | ((load_bytes(twice) >> ((int)(2 * i) + half)) & 1) << 2;
#else
    __builtin_unreachable();                   /* the row would not be wide */
#endif
}

/* The levels of codes; tables of up to 4 bits have 16 entries and stay in registers. */
INLINE Floats level_of(const float *levels, Ints codes, const int bits) {
#if SIZE == 512
    if (bits <= 4) return __builtin_shuffle(load(levels), codes);
#elif SIZE == 256
    if (bits <= 4) {
        Floats x = (Floats)_mm256_permutevar8x32_ps((__m256)load(levels), (__m256i)codes);
        if (bits < 4) return x;
        Floats y = (Floats)_mm256_permutevar8x32_ps((__m256)load(levels + 8), (__m256i)codes);
        return (Floats)_mm256_blendv_ps((__m256)x, (__m256)y, (__m256)(codes << 28));   /* by bit 3 */
    }
#endif
    Floats x;
    for (int i = 0; i < LANES; i++) x[i] = levels[codes[i]];
    return x;
}

/* A row of n codes -> floats: low + scale * code, or low + scale * levels[code]. Scale and low are one for `group`
 * codes, or with group 0 one for each code; of levels, low is always one for each code. */
INLINE void expand(const uint8_t *row, int64_t n, const int bits, const float *levels, const float *scale,
                   const float *low, int64_t group, uint8_t *codes, float *out) {
    if (is_wide(n, bits) && group % LANES == 0) {
        const int64_t runs = bits == 3 ? 4 : 8 / bits, m = n / runs;
        for (int64_t i = 0, at = 0; i < runs; i++)
            for (int64_t j = 0; j < m; j += LANES, at += LANES) {
                Ints code = codes_of(row, n, bits, i, j);
                const int64_t g = group && group < n ? at / group : 0;
                Floats x = levels ? level_of(levels, code, bits) : __builtin_convertvector(code, Floats);
                x = group ? x * scale[g] : x * load(scale + at);
                store(out + at, levels || !group ? x + load(low + at) : x + low[g]);
            }
        return;
    }
    unpack(row, n, bits, codes);
    for (int64_t j = 0; j < n; j++) {
        const int64_t g = group ? j / group : j;
        out[j] = levels ? levels[codes[j]] * scale[g] + low[j] : (float)codes[j] * scale[g] + low[g];
    }
}

INLINE void expand_halves(const uint16_t *from, int64_t n, float *to) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        Ints bits = load_shorts(from + j);
        Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
        store(to + j, (Floats)((Ints)size | (bits & 0x8000) << 16));
    }
    for (; j < n; j++) to[j] = from_float16(from[j]);
}

/* The sizes of the tokens of a rotated block, and 1 where the mean belongs to it: the sign of a size tells. */
INLINE void expand_sizes(const uint16_t *from, int64_t n, float *size, float *with_mean) {
    expand_halves(from, n, size);
    for (int64_t t = 0; t < n; t++) size[t] = fabsf(size[t]), with_mean[t] = from[t] & 0x8000 ? 0.0f : 1.0f;
}

/* What is added to a row of levels: a mean of each code and one flag, or the other way round. */
INLINE void times(const float *x, float y, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * y;
}

/* The call with `bits` known when it is compiled. */
#define BY_BITS(bits, call) \
    switch (bits) { \
    case 1: { const int B = 1; call; } break; \
    case 2: { const int B = 2; call; } break; \
    case 3: { const int B = 3; call; } break; \
    case 4: { const int B = 4; call; } break; \
    default: { const int B = 8; call; } \
    }

/* keys [D, T] of one block in another basis, of one head of the cache; each row has bits of its own, or none */
INLINE void expand_turned_keys(const Shape *s, Store from, int64_t at, int64_t head,
                               const Scratch *x) {
    const int64_t T = s->block, D = s->key_dim;
    const uint8_t *packed = from.codes + at * D * T * s->key_bits / 8;
    float *with_mean = x->scale + up(T), *means = x->low + up(T);
    expand_sizes(from.scale + at * T, T, x->scale, with_mean);
    expand_halves(from.low + at * D, D, means);
    for (int64_t d = 0; d < D; d++) {
        const int64_t bits = from.widths ? from.widths[head * D + d] : s->key_bits;
        const float *levels = from.levels + (from.widths ? (bits < 8 ? 16 * bits : 80) : 0);
        times(with_mean, means[d], T, bits ? x->low : x->keys + d * T);
        if (!bits) continue;
        BY_BITS(bits, expand(packed, T, B, levels, x->scale, x->low, 0, x->codes, x->keys + d * T))
        packed += T * bits / 8;
    }
}

/* the same of other kinds */
INLINE void expand_keys(const Shape *s, Store from, int64_t at, const int bits, const Scratch *x) {
    const int64_t T = s->block, D = s->key_dim, row = T * bits / 8;
    const uint8_t *packed = from.codes + at * D * row;
    const int64_t scales = s->key_kind == PER_CHANNEL ? D : D / s->key_group * T;
    expand_halves(from.scale + at * scales, scales, x->scale);
    expand_halves(from.low + at * scales, scales, x->low);
    for (int64_t d = 0; d < D; d++) {
        const int64_t first = s->key_kind == PER_CHANNEL ? d : d / s->key_group * T;
        expand(packed + d * row, T, bits, NULL, x->scale + first, x->low + first,
               s->key_kind == PER_CHANNEL ? up(T) : 0, x->codes, x->keys + d * T);
    }
}

/* values [T, D] of one block */
INLINE void expand_values(const Shape *s, Store from, int64_t at, const int bits,
                          const Scratch *x) {
    const int64_t T = s->block, D = s->value_dim, row = D * bits / 8;
    const uint8_t *packed = from.codes + at * T * row;
    if (s->value_kind == ROTATED) {
        float *with_mean = x->scale + up(T), *means = x->low + up(D);
        expand_sizes(from.scale + at * T, T, x->scale, with_mean);
        expand_halves(from.low + at * D, D, means);
        for (int64_t t = 0; t < T; t++) {
            times(means, with_mean[t], D, x->low);
            expand(packed + t * row, D, bits, from.levels, x->scale + t, x->low, up(D), x->codes,
                   x->values + t * D);
        }
        return;
    }
    const int64_t groups = D / s->value_group, group = groups > 1 ? s->value_group : up(D);
    expand_halves(from.scale + at * T * groups, T * groups, x->scale);
    expand_halves(from.low + at * T * groups, T * groups, x->low);
    for (int64_t t = 0; t < T; t++)
        expand(packed + t * row, D, bits, NULL, x->scale + t * groups, x->low + t * groups, group, x->codes,
               x->values + t * D);
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

INLINE void packed_head(const Shape *s, Store keys, Store values, int64_t blocks, int64_t tokens, const State *state,
                        int64_t head, const Scratch *x) {
    const int64_t T = s->block, D = s->key_dim, V = s->value_dim, padded = up(T), width = up(V);
    const uint8_t *mask = state->mask ? state->mask + head / s->heads * s->mask_stride : NULL;
    const float *query = state->query + head * s->queries * D;
    take_out(s, state, head, x->out, 0);
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t left = tokens - i * T, valid = left < T ? left : T;
        int any = 0;
        if (s->key_kind == ROTATED) expand_turned_keys(s, keys, head * blocks + i, head % s->heads, x);
        else BY_BITS(s->key_bits, expand_keys(s, keys, head * blocks + i, B, x))
        for (int64_t r = 0; r < s->queries; r += ROWS)
            BY_ROWS(s->queries - r, scores_of(query + r * D, D, x->keys, T, R, x->score + r * padded, padded))
        for (int64_t r = 0; r < s->queries; r++)
            any |= weigh(x->score + r * padded, valid, padded, mask ? mask + i * T : NULL, s->softcap,
                         state->top + head * s->queries + r, state->total + head * s->queries + r,
                         x->out + r * width, V);
        if (!any) continue;
        BY_BITS(s->value_bits, expand_values(s, values, head * blocks + i, B, x))
        for (int64_t r = 0; r < s->queries; r += ROWS)
            BY_ROWS(s->queries - r, add_values(x->score + r * padded, padded, x->values, T, V, V, R,
                                               x->out + r * width, width))
    }
    take_out(s, state, head, x->out, 1);
}

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

PACKED(MACHINE(packed)) { packed_head(s, keys, values, blocks, tokens, state, head, x); }

PLAIN(MACHINE(plain)) {
    if (kind == FLOAT32) plain_head(s, keys, key_step, values, value_step, FLOAT32, tokens, state, head, x);
    else plain_head(s, keys, key_step, values, value_step, BFLOAT16, tokens, state, head, x);
}
