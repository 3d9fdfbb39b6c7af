/* The inner loops of packed.c for x86 with AVX2 and FMA. Part of that file, apart for reading. */

AVX2 static void quantize_avx2(const Layout *l, const Blocks *b, const void *x, int64_t m, int64_t kind,
                               int paired, Activations a) {
    quantize(l, b, x, m, kind, paired, a);   /* the same C, compiled for wider registers */
}

/* Where 16 codes of any width lie in 16 bytes: code j begins in byte j*bits/8 at bit j*bits%8 and ends within
 * the next byte. So: fetch both bytes into a 16-bit lane, push what is above the code out at the top (a
 * multiplication, as AVX2 has no 16-bit variable shift), and shift down. */
typedef struct { __m256i bytes, up; } Pattern;

AVX2 INLINE Pattern make_pattern(const int bits) {
    uint8_t bytes[32];
    uint16_t up[16];
    for (int j = 0; j < 16; j++) {
        int at = j * bits / 8;
        bytes[2 * j] = (uint8_t)at;
        bytes[2 * j + 1] = (uint8_t)(at + 1 < 16 ? at + 1 : 0x80);
        up[j] = (uint16_t)(1 << (16 - bits - j * bits % 8));
    }
    Pattern p = {_mm256_loadu_si256((const __m256i *)bytes), _mm256_loadu_si256((const __m256i *)up)};
    return p;
}

AVX2 INLINE __m256i codes16(const int bits, const uint8_t *at, Pattern p) {
    if (bits == 8) return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at));
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)at));
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, p.bytes), p.up), 16 - bits);
}

/* One chunk (32 codes): columns in order, but for 4 bits the even ones first. */
AVX2 INLINE void codes32(const int bits, const uint8_t *at, Pattern p, __m256i *low, __m256i *high) {
    if (bits == 4) {
        __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at));
        *low = _mm256_and_si256(pairs, _mm256_set1_epi16(15));
        *high = _mm256_srli_epi16(pairs, 4);
    } else {
        *low = codes16(bits, at, p);
        *high = codes16(bits, at + 2 * bits, p);
    }
}

AVX2 INLINE float add_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* Fills 8 of a row of factor and takes from a product's 8 partial sums what the zero points of 8 blocks do.
 * Beyond the last block all x_ are 0. */
AVX2 INLINE __m256 take_off(__m256 total, __m256 scale, __m256 zero, const float *x_scale, const float *x_sum,
                            float *factor) {
    __m256 f = _mm256_mul_ps(scale, _mm256_loadu_ps(x_scale));
    _mm256_storeu_ps(factor, f);
    return _mm256_fnmadd_ps(f, _mm256_mul_ps(zero, _mm256_loadu_ps(x_sum)), total);
}

/* A row of factor, and the partial sums to start from, for row m of the activations; the grid is in `s`. */
AVX2 INLINE __m256 make_factor(const Product *p, int64_t m, const Scratch *s, float *factor) {
    const int64_t padded = p->blocks->padded;
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < padded; i += 8)
        total = take_off(total, _mm256_loadu_ps(s->scale + i), _mm256_loadu_ps(s->zero + i),
                         p->x.scale + m * padded + i, p->x.sum + m * padded + i, factor + i);
    return total;
}

/* The same for m = 0, one bfloat16 scale per block, and a grid read in place: up to 7 values past the row's. */
AVX2 INLINE __m256 make_factor_wide(const Product *p, int64_t row, float *factor) {
    const uint16_t *scale = (const uint16_t *)p->weight.scale + row * p->layout->scale_stride;
    const uint8_t *zeros = p->weight.zero ? p->weight.zero + row * p->layout->scale_stride : NULL;
    const int64_t padded = p->blocks->padded;
    __m256 total = _mm256_setzero_ps(), zero = _mm256_set1_ps((float)p->layout->midpoint);
    for (int64_t i = 0; i < padded; i += 8) {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(scale + i)));
        if (zeros)
            zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(zeros + i))));
        total = take_off(total, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), zero, p->x.scale + i,
                         p->x.sum + i, factor + i);
    }
    return total;
}

/* TILE products: of TILE output rows (wide) with one row of activations, or of one output
 * row with TILE rows of activations. `chunks`, per block, is known when compiled, as are `bits` and `wide`. */
AVX2 INLINE void tile(const int bits, const int wide, const int chunks, const Layout *l, const Blocks *b,
                      const uint8_t *data, const int16_t *x, const float *factor, const __m256 *start, float *out) {
    const int64_t step = b->count * b->span, group_bytes = l->width * bits / 8;
    const Pattern pattern = make_pattern(bits);
    __m256 total[TILE];
#pragma GCC unroll 4
    for (int t = 0; t < TILE; t++) total[t] = start[t];
    for (int64_t i = 0, in_group = 0; i < b->count; i++, factor++) {
        const uint8_t *at = data + in_group * (BLOCK / 8 * bits);
        __m256i sum[TILE];
#pragma GCC unroll 4
        for (int t = 0; t < TILE; t++) sum[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int c = 0; c < chunks; c++, at += CHUNK / 8 * bits, x += CHUNK) {
            __m256i low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 4
            for (int t = 0; t < TILE; t++) {
                if (wide || t == 0) codes32(bits, at + t * l->row_bytes, pattern, &low, &high);
                const __m256i *xs = (const __m256i *)(x + (wide ? 0 : t * step));
                __m256i both = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_load_si256(xs)),
                                                _mm256_madd_epi16(high, _mm256_load_si256(xs + 1)));
                sum[t] = _mm256_add_epi32(sum[t], both);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < TILE; t++)
            total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), _mm256_broadcast_ss(factor + t * b->padded),
                                       total[t]);
        if (++in_group == b->per_group) in_group = 0, data += group_bytes;
    }
#pragma GCC unroll 4
    for (int t = 0; t < TILE; t++) out[t] = add_lanes(total[t]);
}

typedef void (*Kernel)(const Layout *, const Blocks *, const uint8_t *, const int16_t *, const float *, const __m256 *,
                       float *);

#define KERNEL(bits, wide, chunks) \
    AVX2 static void kernel_##bits##_##wide##_##chunks(const Layout *l, const Blocks *b, const uint8_t *data, \
                                                       const int16_t *x, const float *factor, \
                                                       const __m256 *start, float *out) { \
        tile(bits, wide, chunks, l, b, data, x, factor, start, out); \
    }
#define KERNELS(bits) \
    KERNEL(bits, 0, 1) KERNEL(bits, 0, 2) KERNEL(bits, 0, 4) KERNEL(bits, 1, 1) KERNEL(bits, 1, 2) KERNEL(bits, 1, 4)
#define NAMES(bits) \
    {{kernel_##bits##_0_1, kernel_##bits##_0_2, kernel_##bits##_0_4}, \
     {kernel_##bits##_1_1, kernel_##bits##_1_2, kernel_##bits##_1_4}}

KERNELS(2) KERNELS(3) KERNELS(4) KERNELS(5) KERNELS(6) KERNELS(7) KERNELS(8)
static const Kernel kernels[7][2][3] = {NAMES(2), NAMES(3), NAMES(4), NAMES(5), NAMES(6), NAMES(7), NAMES(8)};

/* TILE output rows from `row` on, for the only row of activations. */
AVX2 static void rows_avx2(const Product *p, Kernel kernel, int64_t row, int plain, const Scratch *s) {
    float out[TILE];
    __m256 start[TILE];
    for (int t = 0; t < TILE; t++) {
        float *factor = s->factor + t * p->blocks->padded;
        if (plain) { start[t] = make_factor_wide(p, row + t, factor); continue; }
        read_grid(p->layout, p->blocks, p->weight, row + t, s);
        start[t] = make_factor(p, 0, s, factor);
    }
    kernel(p->layout, p->blocks, p->weight.packed + row * p->layout->row_bytes, p->x.codes, s->factor, start, out);
    for (int t = 0; t < TILE; t++) finish(p, 0, row + t, out[t]);
}

/* One output row, for all rows of activations. */
AVX2 static void row_avx2(const Product *p, Kernel kernel, int64_t row, const Scratch *s) {
    const Blocks *b = p->blocks;
    const uint8_t *data = readable(p->layout, p->weight, row, s->row);
    float out[TILE];
    __m256 start[TILE];
    read_grid(p->layout, b, p->weight, row, s);
    for (int64_t m = 0; m < p->m; m += TILE) {
        for (int t = 0; t < TILE; t++) start[t] = make_factor(p, m + t, s, s->factor + t * b->padded);
        kernel(p->layout, b, data, p->x.codes + m * b->count * b->span, s->factor, start, out);
        for (int t = 0; t < TILE && m + t < p->m; t++) finish(p, m + t, row, out[t]);
    }
}

AVX2 static void product_avx2(const Product *p, int64_t first, int64_t last, Scratch s) {
    const Layout *l = p->layout;
    const Blocks *b = p->blocks;
    const int plain = b->per_group == 1 && l->scale_stride && l->scale_kind == BFLOAT16;
    const int64_t chunks = b->span / CHUNK;
    const Kernel *kernel = &kernels[l->bits - 2][0][chunks == 4 ? 2 : chunks - 1];
    int64_t row = first;
    if (p->m == 1)   /* as long as wide reads past the TILE rows stay inside the arrays */
        for (; row + TILE <= last; row += TILE) {
            int64_t after = l->rows - row - TILE;
            if (after * l->row_bytes < SLACK || after * l->groups < 8) break;
            rows_avx2(p, kernel[3], row, plain, &s);
        }
    for (; row < last; row++) row_avx2(p, kernel[0], row, &s);
}

AVX2 INLINE void unpack_avx2(const Layout *l, const Blocks *b, const int bits, const uint8_t *row, int16_t *codes) {
    Pattern pattern = make_pattern(bits);
    for (int64_t i = 0; i < b->count; i++) {
        const uint8_t *at = row + block_start(l, b, i) * bits / 8;
        for (int64_t c = 0; c < b->span; c += 16, at += 2 * bits, codes += 16)
            _mm256_storeu_si256((__m256i *)codes, codes16(bits, at, pattern));
    }
}

AVX2 static void expand_avx2(const Layout *l, const Blocks *b, Weight w, int64_t row, char *out, int64_t kind,
                             const Scratch *s) {
    const uint8_t *data = readable(l, w, row, s->row);
    read_grid(l, b, w, row, s);
    switch (l->bits) {
    case 2: unpack_avx2(l, b, 2, data, s->codes); break;
    case 3: unpack_avx2(l, b, 3, data, s->codes); break;
    case 4: unpack_avx2(l, b, 4, data, s->codes); break;
    case 5: unpack_avx2(l, b, 5, data, s->codes); break;
    case 6: unpack_avx2(l, b, 6, data, s->codes); break;
    case 7: unpack_avx2(l, b, 7, data, s->codes); break;
    default: unpack_avx2(l, b, 8, data, s->codes);
    }
    expand_row(l, b, s, out, kind);
}
