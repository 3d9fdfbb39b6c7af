/* Products with packed weights, and their expansion: plain C, called through ctypes (see ../native.py).
 *
 * A weight [rows, cols] is a uint8 array [rows, row_bytes]; code j of a row is bits [j*bits, (j+1)*bits) of the
 * row's little-endian bit stream, and stands for (code - zero) * scale of its group of `width` columns.
 *
 * linear() puts the activations on a 16-bit grid, one scale per block (at most 128 columns of one group), so
 * that a block's product is an exact int32 sum: 128 * 255 * 32767 < 2^30. What is lost is the activations'
 * rounding, at most 2^-16 of the block's largest value.
 *
 * Two sets of inner loops: AVX2 (chosen when the program runs) and portable C. Threads come from OpenMP;
 * the library is compiled with -fopenmp but not linked to a runtime, so it uses the one torch has loaded. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE)   /* -DPORTABLE: to test the other loops */
#define HAVE_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 128, CHUNK = 32, TILE = 4, SLACK = BLOCK + 16 };   /* SLACK: a row's last block is read whole, by wide loads */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    int64_t rows, cols, row_bytes, groups, width;
    int64_t scale_stride;   /* groups, or 0 when one scale serves all rows */
    int64_t bits, midpoint, scale_kind;
} Layout;

typedef struct { const uint8_t *packed; const void *scale; const uint8_t *zero; } Weight;

/* ---- numbers ---- */

INLINE float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float from_bfloat16(uint16_t half) { return from_bits((uint32_t)half << 16); }

INLINE uint16_t to_bfloat16(float value) {   /* to nearest, ties to even */
    uint32_t bits = to_bits(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    if (rest >= 0x0f800000) return from_bits(sign | 0x7f800000 | (rest & 0x7fffff));
    return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));   /* moves the exponent, subnormals too */
}

INLINE float load_float(const void *data, int64_t index, int64_t kind) {
    if (kind == FLOAT32) return ((const float *)data)[index];
    uint16_t half = ((const uint16_t *)data)[index];
    return kind == BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

INLINE void store_float(void *data, int64_t index, int64_t kind, float value) {
    if (kind == FLOAT32) ((float *)data)[index] = value;
    else ((uint16_t *)data)[index] = to_bfloat16(value);
}

/* ---- blocks: how a row is cut ---- */

typedef struct {
    int64_t per_group, count;
    int64_t padded;   /* count rounded up to whole vectors of 8 */
    int64_t span;     /* a block's columns rounded up to 1, 2 or 4 chunks */
} Blocks;

static Blocks cut(const Layout *l) {
    int64_t per_group = (l->width + BLOCK - 1) / BLOCK, widest = l->width < BLOCK ? l->width : BLOCK;
    int64_t span = widest <= CHUNK ? CHUNK : widest <= 2 * CHUNK ? 2 * CHUNK : BLOCK;
    Blocks b = {per_group, per_group * l->groups, (per_group * l->groups + 7) / 8 * 8, span};
    return b;
}

INLINE int64_t block_start(const Layout *l, const Blocks *b, int64_t i) {
    return i / b->per_group * l->width + i % b->per_group * BLOCK;
}

INLINE int64_t block_length(const Layout *l, const Blocks *b, int64_t i) {
    int64_t left = l->width - i % b->per_group * BLOCK;
    return left < BLOCK ? left : BLOCK;
}

/* What one thread needs besides its arguments. Rows of per-block values are `Blocks.padded` long. */
typedef struct {
    float *scale, *zero;   /* [padded]: of the present row */
    float *factor;         /* [TILE, padded]: scale of the weight times scale of the activations */
    int16_t *codes;        /* [blocks, span]: the present row, unpacked */
    uint8_t *row;          /* [row_bytes + SLACK] */
} Scratch;

static Scratch allocate(const Layout *l, const Blocks *b) {
    Scratch s = {0};
    char *memory = calloc(1, b->padded * 4 * (2 + TILE) + b->count * 2 * b->span + l->row_bytes + SLACK);
    if (!memory) return s;
    s.scale = (float *)memory;
    s.zero = s.scale + b->padded;
    s.factor = s.zero + b->padded;
    s.codes = (int16_t *)(s.factor + TILE * b->padded);
    s.row = (uint8_t *)(s.codes + b->count * b->span);
    for (int64_t i = 0; i < b->count; i++) s.zero[i] = (float)l->midpoint;
    return s;
}

/* Scale and zero point of every block of a row; a symmetric zero point is there already. */
static void read_grid(const Layout *l, const Blocks *b, Weight w, int64_t row, const Scratch *s) {
    int64_t at = row * l->scale_stride, i = 0;
    for (int64_t g = 0; g < l->groups; g++)
        for (int64_t j = 0; j < b->per_group; j++, i++) {
            s->scale[i] = load_float(w.scale, at + g, l->scale_kind);
            if (w.zero) s->zero[i] = w.zero[at + g];
        }
}

/* A row that may be read SLACK bytes past its end: itself, or a copy near the end of the array. */
static const uint8_t *readable(const Layout *l, Weight w, int64_t row, uint8_t *scratch) {
    const uint8_t *source = w.packed + row * l->row_bytes;
    if ((l->rows - row - 1) * l->row_bytes >= SLACK) return source;
    memcpy(scratch, source, l->row_bytes);
    return scratch;
}

/* ---- activations on a 16-bit grid ---- */

typedef struct {
    float *scale;     /* [m, padded]; m is rounded up to whole TILEs, all zeros beyond the real ones */
    float *sum;       /* [m, padded]: of the block's codes, for the zero point */
    int16_t *codes;   /* [m, blocks, span], zero beyond a block's length */
} Activations;

/* Zeroed out when all are (next to) zero; NaN when one is not finite. */
INLINE float block_scale(const float *x, int64_t length) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < length; i++) {
        uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000) return from_bits(0x7fc00000);
    float value = from_bits(largest);
    return value < 1e-30f ? 0.0f : value / 32767.0f;
}

/* `paired`: in every chunk the even columns come first, as the AVX2 loop for 4 bits meets them. */
INLINE void quantize_block(const float *x, int64_t length, int64_t span, int paired, float *scale, float *sum,
                           int16_t *codes) {
    int16_t plain[BLOCK];
    float step = block_scale(x, length), inverse = step > 0 ? 1.0f / step : 0.0f;
    int32_t total = 0;
    memset(plain, 0, sizeof plain);
    if (step > 0)
        for (int64_t i = 0; i < length; i++) {   /* adding 1.5 * 2^23 rounds to the nearest integer */
            int32_t code = (int32_t)(to_bits(x[i] * inverse + 12582912.0f) - 0x4b400000u);
            plain[i] = (int16_t)code;
            total += code;
        }
    *scale = step;
    *sum = (float)total;
    if (!paired) { memcpy(codes, plain, 2 * span); return; }
    for (int64_t c = 0; c < span; c += CHUNK)
        for (int i = 0; i < CHUNK / 2; i++) {
            codes[c + i] = plain[c + 2 * i];
            codes[c + CHUNK / 2 + i] = plain[c + 2 * i + 1];
        }
}

INLINE void quantize(const Layout *l, const Blocks *b, const void *x, int64_t m, int64_t kind, int paired,
                     Activations a) {
    float values[BLOCK];
    for (int64_t i = 0; i < m * b->count; i++) {
        int64_t row = i / b->count, block = i % b->count, at = row * b->padded + block;
        int64_t start = row * l->cols + block_start(l, b, block), length = block_length(l, b, block);
        const float *source = (const float *)x + start;
        if (kind == BFLOAT16) {
            for (int64_t j = 0; j < length; j++) values[j] = from_bfloat16(((const uint16_t *)x)[start + j]);
            source = values;
        }
        quantize_block(source, length, b->span, paired, a.scale + at, a.sum + at, a.codes + i * b->span);
    }
}

typedef struct {
    const Layout *layout; const Blocks *blocks; Weight weight; const void *bias; Activations x; int64_t m;
    void *y; int64_t kind;
} Product;

static void finish(const Product *p, int64_t m, int64_t row, float value) {
    if (p->bias) value += load_float(p->bias, row, p->kind);
    store_float(p->y, m * p->layout->rows + row, p->kind, value);
}

/* ---- portable loops ---- */

/* Codes of a row as int16, block after block, each at a multiple of span. */
static void unpack_portable(const Layout *l, const Blocks *b, const uint8_t *row, int16_t *codes) {
    int mask = (1 << l->bits) - 1;
    for (int64_t i = 0; i < b->count; i++) {
        int64_t bit = block_start(l, b, i) * l->bits, length = block_length(l, b, i);
        for (int64_t j = 0; j < length; j++, bit += l->bits) {
            const uint8_t *at = row + bit / 8;
            codes[i * b->span + j] = (int16_t)(((at[0] | at[1] << 8) >> (bit % 8)) & mask);
        }
    }
}

static void product_portable(const Product *p, int64_t first, int64_t last, Scratch s) {
    const Blocks *b = p->blocks;
    for (int64_t row = first; row < last; row++) {
        read_grid(p->layout, b, p->weight, row, &s);
        unpack_portable(p->layout, b, readable(p->layout, p->weight, row, s.row), s.codes);
        for (int64_t m = 0; m < p->m; m++) {
            float total = 0;
            for (int64_t i = 0; i < b->count; i++) {
                const int16_t *x = p->x.codes + (m * b->count + i) * b->span, *w = s.codes + i * b->span;
                int32_t sum = 0;
                for (int64_t j = 0; j < b->span; j++) sum += w[j] * x[j];
                total += ((float)sum - s.zero[i] * p->x.sum[m * b->padded + i])
                    * (s.scale[i] * p->x.scale[m * b->padded + i]);
            }
            finish(p, m, row, total);
        }
    }
}

INLINE void affine(const int16_t *codes, int64_t length, float scale, float zero, void *out, int64_t kind) {
    if (kind == FLOAT32)
        for (int64_t j = 0; j < length; j++) ((float *)out)[j] = ((float)codes[j] - zero) * scale;
    else
        for (int64_t j = 0; j < length; j++) ((uint16_t *)out)[j] = to_bfloat16(((float)codes[j] - zero) * scale);
}

INLINE void expand_row(const Layout *l, const Blocks *b, const Scratch *s, char *out, int64_t kind) {
    int64_t size = kind == FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < b->count; i++)
        affine(s->codes + i * b->span, block_length(l, b, i), s->scale[i], s->zero[i],
               out + block_start(l, b, i) * size, kind);
}

static void expand_portable(const Layout *l, const Blocks *b, Weight w, int64_t row, char *out, int64_t kind,
                            const Scratch *s) {
    read_grid(l, b, w, row, s);
    unpack_portable(l, b, readable(l, w, row, s->row), s->codes);
    expand_row(l, b, s, out, kind);
}

#ifdef HAVE_AVX2
#include "packed_avx2.h"
#endif

/* ---- entry points ---- */

static int use_avx2(const Layout *l) {   /* every group has to start at a whole byte */
#ifdef HAVE_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
        && (l->groups == 1 || l->width * l->bits % 8 == 0);
#else
    return 0;
#endif
}

/* y[m, rows] = x[m, cols] W^T + bias; x, y and bias are of one kind, FLOAT32 or BFLOAT16.
 * Returns 0, or -1 when there is no memory. */
int llmslim_linear(const Layout *l, const void *packed, const void *scale, const void *zero, const void *bias,
                   const void *x, void *y, int64_t m, int64_t kind, int threads) {
    Blocks b = cut(l);
    int fast = use_avx2(l), failed = 0;
    int64_t whole = (m + TILE - 1) / TILE * TILE;
    char *memory = calloc(1, whole * (b.padded * 8 + b.count * 2 * b.span) + SLACK);
    if (!memory) return -1;
    Activations a;
    a.codes = (int16_t *)(((uintptr_t)memory + 31) & ~(uintptr_t)31);   /* aligned loads for AVX2 */
    a.scale = (float *)(a.codes + whole * b.count * b.span);
    a.sum = a.scale + whole * b.padded;
    Product p = {l, &b, {packed, scale, zero}, bias, a, m, y, kind};
#ifdef HAVE_AVX2
    if (fast) quantize_avx2(l, &b, x, m, kind, l->bits == 4, a); else
#endif
    quantize(l, &b, x, m, kind, 0, a);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int part = 0; part < threads; part++) {
        int64_t first = l->rows * part / threads, last = l->rows * (part + 1) / threads;
        Scratch s = allocate(l, &b);
        if (!s.scale) { failed = -1; continue; }
#ifdef HAVE_AVX2
        if (fast) product_avx2(&p, first, last, s); else
#endif
        product_portable(&p, first, last, s);
        free(s.scale);
    }
    free(memory);
    return failed;
}

/* out[i] = row index[i] of W, or row first + i when index is NULL; out is [count, cols] of `kind`.
 * Returns 0, -1 when there is no memory, -2 when an index is outside [0, rows). */
int llmslim_dequantize(const Layout *l, const void *packed, const void *scale, const void *zero,
                       const int64_t *index, int64_t first, int64_t count, void *out, int64_t kind, int threads) {
    Blocks b = cut(l);
    Weight w = {packed, scale, zero};
    int64_t stride = l->cols * (kind == FLOAT32 ? 4 : 2);
    int fast = use_avx2(l), failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int part = 0; part < threads; part++) {
        Scratch s = allocate(l, &b);
        if (!s.scale) { failed = -1; continue; }
        for (int64_t i = count * part / threads; i < count * (part + 1) / threads; i++) {
            int64_t row = index ? index[i] : first + i;
            if (row < 0 || row >= l->rows) { failed = -2; break; }
#ifdef HAVE_AVX2
            if (fast) expand_avx2(l, &b, w, row, (char *)out + i * stride, kind, &s); else
#endif
            expand_portable(l, &b, w, row, (char *)out + i * stride, kind, &s);
        }
        free(s.scale);
    }
    return failed;
}
