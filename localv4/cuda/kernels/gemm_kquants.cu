// Products of many tokens with the formats of localv4/kernels/packed_kquants.py, which has the layouts.
//
// A stage is a superblock. Of a block a thread has columns 8 * member ... + 7, so of two parts of
// sixteen columns two threads have one each: each part is an instruction, in which the others give
// zeros. Whole numbers (localv4/kernels/kquant_kinds.py) fit float32, so they are made as floats.

#include "gemm_experts.cuh"
#include "packed_kquants.cuh"

// The float of a whole number of 23 bits.
__device__ inline float small_float(int number) { return __int_as_float(MAGIC + number) - MAGIC_FLOAT; }

// --- scales: those of rows 2 * i and 2 * i + 1 of a block ---

template <int PARTS>
struct Factors2 {
    float scale[PARTS][2], least[PARTS][2];
};

// The six-bit numbers of a row of a step.
struct SixBits {
    u32 low[2], high[2];

    __device__ static SixBits of(const u8 *w, int block, int row) {
        int step = block / 2;
        SixBits six;
        SixBitNumbers::numbers(*(const u16 *)(w + 64 + 32 * step + 2 * row), w[192 + 16 * step + row], six.low, six.high);
        return six;
    }
};

__device__ inline void load_factors(Q4K, Factors2<1> &factors, const u8 *w, int block, Place own, const uint2 *) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        SixBits six = SixBits::of(w, block, 2 * own.group + i);
        bool odd = block % 2 != 0;
        factors.scale[0][i] = small_float((int)(odd ? six.low[1] : six.low[0]));
        factors.least[0][i] = small_float((int)(odd ? six.high[1] : six.high[0]));
    }
}

__device__ inline void load_factors(Q3, Factors2<2> &factors, const u8 *w, int block, Place own, const uint2 *) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        SixBits six = SixBits::of(w, block, 2 * own.group + i);
        bool odd = block % 2 != 0;
        factors.scale[0][i] = small_float((int)(odd ? six.high[0] : six.low[0]) - 32);
        factors.scale[1][i] = small_float((int)(odd ? six.high[1] : six.low[1]) - 32);
    }
}

__device__ inline void load_factors(Q6, Factors2<2> &factors, const u8 *w, int block, Place own, const uint2 *) {
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            factors.scale[part][i] = small_float((i8)w[64 + 32 * block + 16 * part + 2 * own.group + i]);
}

__device__ inline void load_factors(Q2, Factors2<2> &factors, const u8 *w, int block, Place own, const uint2 *) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 nibbles = *(const u32 *)(w + 64 + 64 * (block / 2) + 4 * (2 * own.group + i)) >> (4 * (block % 2));
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            factors.scale[part][i] = small_float((int)(nibbles >> (16 * part) & 15));
            factors.least[part][i] = small_float((int)(nibbles >> (16 * part + 8) & 15));
        }
    }
}

__device__ inline void load_factors(Iq2, Factors2<1> &factors, const u8 *, int, Place, const uint2 *lines) {
    factors.scale[0][0] = small_float(dot4(lines[1].x >> 7 & 0x01010101, 0x10080402, 1));
    factors.scale[0][1] = small_float(dot4(lines[1].y >> 7 & 0x01010101, 0x10080402, 1));
}

// --- weights: eight columns of a row, from the words of the row in the lines of the block ---

// Bytes minus the same number of each, without a borrow: for bytes and results below 128.
__device__ inline u32 minus_middle(u32 bytes, u32 middle) {
    return (bytes + 0x80808080 - middle * 0x01010101) ^ 0x80808080;
}

__device__ inline void decode(Q4K, const u32 (&words)[4], int member, u32 &low, u32 &high) {
    u32 word = member < 2 ? (member == 0 ? words[0] : words[1]) : (member == 2 ? words[2] : words[3]);
    low = word & 0x0F0F0F0F, high = word >> 4 & 0x0F0F0F0F;
}

__device__ inline void decode(Q6, const u32 (&words)[6], int member, u32 &low, u32 &high) {
    u32 first = member < 2 ? words[0] : words[3], second = member < 2 ? words[1] : words[4];
    u32 third = member < 2 ? words[2] : words[5];
    u32 upper = (first >> 6 & 0x03030303) | (second >> 4 & 0x0C0C0C0C) | (third >> 2 & 0x30303030);
    low = minus_middle((member % 2 ? third : first) & 0x3F3F3F3F, 32);
    high = minus_middle(member % 2 ? upper : second & 0x3F3F3F3F, 32);
}

__device__ inline void decode(Q3, const u32 (&words)[3], int member, u32 &low, u32 &high) {
    u32 word = member == 0 ? words[0] : member == 1 ? words[1] : words[2];
    u32 sixth = (words[0] >> 6 & 0x03030303) | (words[2] >> 4 & 0x04040404);
    u32 seventh = (words[1] >> 6 & 0x03030303) | (words[2] >> 5 & 0x04040404);
    low = minus_middle(member == 3 ? sixth : word & 0x07070707, 4);
    high = minus_middle(member == 3 ? seventh : word >> 3 & 0x07070707, 4);
}

__device__ inline void decode(Q2, const u32 (&words)[2], int member, u32 &low, u32 &high) {
    u32 word = (member < 2 ? words[0] : words[1]) >> (4 * (member % 2));
    low = word & 0x03030303, high = word >> 2 & 0x03030303;
}

__device__ inline void decode(Iq2, const u32 (&words)[2], int member, u32 &low, u32 &high) {
    uint2 both = Iq2::columns(Iq2::points(), words, member);
    low = both.x, high = both.y;
}

// --- formats as gemm.cuh has them ---

// `part` and `least` are sums over the superblock, of whole numbers times scales of activations.
template <int NUMBERS>
struct SuperblockSums {
    float total[4], part[NUMBERS][4];
};

template <class Source>
struct Kquant {
    static constexpr int COLUMNS = 256, BYTES = Source::SUPERBLOCK_BYTES, PARTS = Source::PARTS;
    static constexpr int LINES = Source::LINES, NUMBERS = Source::NUMBERS;
    static constexpr bool WANTS_SUMS = NUMBERS == 2;
    static constexpr float FACTOR = 1.0f;
    typedef SuperblockSums<NUMBERS> Sums;

    struct Rows {
        u32 a[PARTS][4];
        Factors2<PARTS> factors;
        float base[2];  // -MAGIC_FLOAT * scale of the first part
    };

    __device__ static void prepare() { Source::lookup(); }
    __device__ static int place(int offset) { return offset; }

    __device__ static Rows load(const u8 *w, int block, Place own) {
        Rows rows;
        uint2 lines[LINES];
        u32 first[LINES], second[LINES], a[4];
#pragma unroll
        for (int j = 0; j < LINES; ++j) {
            lines[j] = *(const uint2 *)(w + Source::CODES_AT + 64 * (LINES * block + j) + 8 * own.group);
            first[j] = lines[j].x, second[j] = lines[j].y;
        }
        decode(Source(), first, own.member, a[0], a[2]);
        decode(Source(), second, own.member, a[1], a[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                rows.a[part][i] = PARTS == 1 || own.member / 2 == part ? a[i] : 0;
        load_factors(Source(), rows.factors, w, block, own, lines);
        for (int i = 0; i < 2; ++i) rows.base[i] = -MAGIC_FLOAT * rows.factors.scale[0][i];
        return rows;
    }

    __device__ static void add(Sums &sums, const Rows &rows, const u32 (&b)[2], const Columns &at) {
        const int start[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
        int dots[PARTS][4];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) mma_s8(dots[part], rows.a[part], b, start);
        const Factors2<PARTS> &factors = rows.factors;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = i / 2, token = i % 2;
            float whole = __fmaf_rn(__int_as_float(dots[0][i]), factors.scale[0][row], rows.base[row]);
            if (PARTS == 2) {
                float dot = __int_as_float(dots[PARTS - 1][i]) - MAGIC_FLOAT;
                whole = __fmaf_rn(dot, factors.scale[PARTS - 1][row], whole);
            }
            sums.part[0][i] = __fmaf_rn(whole, at.d[token], sums.part[0][i]);
            if (NUMBERS == 1) continue;
            float first = PARTS == 2 ? at.low[token] : at.low[token] + at.high[token];
            float least = first * factors.least[0][row];
            if (PARTS == 2) least = __fmaf_rn(at.high[token], factors.least[PARTS - 1][row], least);
            sums.part[NUMBERS - 1][i] = __fmaf_rn(least, at.d[token], sums.part[NUMBERS - 1][i]);
        }
    }

    // Add the parts, times what the head of the superblock at w has for the two rows.
    __device__ static void finish(Sums &sums, const u8 *w, Place own) {
#pragma unroll
        for (int number = 0; number < NUMBERS; ++number) {
            float head[2];
            if (NUMBERS == 1) {
                float2 both = *(const float2 *)(w + 8 * own.group);
                head[0] = both.x, head[1] = both.y;
            } else {
                u32 both = *(const u32 *)(w + 32 * number + 4 * own.group);
                head[0] = half_bits_to_float(both & 0xFFFF), head[1] = half_bits_to_float(both >> 16);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float factor = number == 0 ? head[i / 2] : -head[i / 2];
                sums.total[i] = __fmaf_rn(sums.part[number][i], factor, sums.total[i]);
                sums.part[number][i] = 0.0f;
            }
        }
    }
};

#define KQUANT_KERNELS(prefix, Source, warps, blocks)               \
    GEMM(prefix##_gemm_8, Kquant<Source>, 1, 1, 2, 3, 1, 4)         \
    GEMM(prefix##_gemm_16, Kquant<Source>, 1, 2, 2, 3, 1, 4)        \
    GEMM(prefix##_gemm_32, Kquant<Source>, 2, 4, warps, 2, 1, 2)    \
    EXPERTS(prefix, Kquant<Source>, 4, warps, 2, 2, blocks)

KQUANT_KERNELS(q4k, Q4K, 4, 2)
KQUANT_KERNELS(q6, Q6, 2, 6)
KQUANT_KERNELS(q3, Q3, 4, 3)
KQUANT_KERNELS(q2, Q2, 4, 3)
KQUANT_KERNELS(iq2, Iq2, 4, 2)
