// Decoding of the formats of localv4/kernels/packed_kquants.py, which has the layouts.
//
// A superblock is 256 columns of sixteen rows: eight blocks of 32 columns, each of one or two PARTS
// with scales of their own. A block has LINES of 64 bytes, of which word `lane` belongs to row `lane`.
// `decode` makes of the words of a row eight words of bytes, word j being columns 4 * j ... 4 * j + 3:
// `value + MIDDLE`. With NUMBERS = 2 a least value is to be subtracted from each product.
//
// `Stored` are the scales of a block of four rows, `factors` those of one of them: for NUMBERS = 1 the
// scales of the parts; else scales and least values, 16 bits for each part.

#pragma once

#include "packed.cuh"

constexpr int SUPERBLOCK_BLOCKS = 8;

// A superblock of so many lines, its codes from line `codes` on; the rest as above.
template <int all_lines, int codes, int lines, int parts, int middle, int numbers>
struct Superblock {
    static constexpr int SUPERBLOCK_BYTES = all_lines * LINE, CODES_AT = codes * LINE, LINES = lines;
    static constexpr int PARTS = parts, MIDDLE = middle, NUMBERS = numbers;
};

// What formats have whose codes are plain numbers.
struct NoLookup {
    struct Lookup {};
    __device__ static inline Lookup lookup() { return {}; }
};

// The six-bit numbers of a step of two blocks (Q4K, Q3): four for each row.
struct SixBitNumbers : NoLookup {
    struct Stored {
        uint2 low;
        u32 high;

        __device__ inline void load(const u8 *superblock, int block, int quad) {
            int step = block / 2;
            low = load_stream_u64(superblock + 64 + 32 * step + 8 * quad);
            high = load_stream_u32(superblock + 192 + 16 * step + 4 * quad);
        }
    };

    // Numbers 0 and 1, and the other two, of a row: from its lower 16 bits, and its upper 8 bits.
    __device__ static inline void numbers(u32 lower, u32 upper, u32 (&low)[2], u32 (&high)[2]) {
        low[0] = lower & 63, low[1] = lower >> 8 & 63;
        high[0] = (lower >> 6 & 3) | (upper << 2 & 0x3c);
        high[1] = (lower >> 14 & 3) | (upper >> 2 & 0x3c);
    }
    __device__ static inline void numbers(const Stored &stored, int row, u32 (&low)[2], u32 (&high)[2]) {
        numbers((row < 2 ? stored.low.x : stored.low.y) >> (16 * (row & 1)), stored.high >> (8 * row), low, high);
    }
};

struct Q4K : SixBitNumbers, Superblock<36, 4, 4, 1, 0, 2> {
    __device__ static inline void decode(const Lookup &, const u32 (&words)[LINES], u32 (&codes)[8]) {
#pragma unroll
        for (int j = 0; j < LINES; ++j) {
            codes[2 * j] = words[j] & 0x0f0f0f0fu;
            codes[2 * j + 1] = words[j] >> 4 & 0x0f0f0f0fu;
        }
    }

    __device__ static inline void factors(const Stored &stored, const u32 (&)[LINES], int block, int row,
                                          int (&scales)[1], int (&least)[1]) {
        u32 low[2], high[2];
        numbers(stored, row, low, high);
        bool odd = block % 2 != 0;
        scales[0] = (int)(odd ? low[1] : low[0]), least[0] = (int)(odd ? high[1] : high[0]);
    }
};

struct Q6 : NoLookup, Superblock<53, 5, 6, 2, 32, 1> {
    struct Stored {
        u32 first, second;

        __device__ inline void load(const u8 *superblock, int block, int quad) {
            first = load_stream_u32(superblock + 64 + 32 * block + 4 * quad);
            second = load_stream_u32(superblock + 64 + 32 * block + 16 + 4 * quad);
        }
    };

    __device__ static inline void decode(const Lookup &, const u32 (&words)[LINES], u32 (&codes)[8]) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const u32 *own = words + 3 * part;
            for (int j = 0; j < 3; ++j) codes[4 * part + j] = own[j] & 0x3f3f3f3fu;
            codes[4 * part + 3] = (own[0] >> 6 & 0x03030303u) | (own[1] >> 4 & 0x0c0c0c0cu)
                                  | (own[2] >> 2 & 0x30303030u);
        }
    }

    __device__ static inline void factors(const Stored &stored, const u32 (&)[LINES], int, int row,
                                          int (&scales)[2], int (&)[2]) {
        scales[0] = (i8)(stored.first >> (8 * row)), scales[1] = (i8)(stored.second >> (8 * row));
    }
};

struct Q3 : SixBitNumbers, Superblock<28, 4, 3, 2, 4, 1> {
    __device__ static inline void decode(const Lookup &, const u32 (&words)[LINES], u32 (&codes)[8]) {
#pragma unroll
        for (int j = 0; j < LINES; ++j) {
            codes[2 * j] = words[j] & 0x07070707u;
            codes[2 * j + 1] = words[j] >> 3 & 0x07070707u;
        }
        codes[6] = (words[0] >> 6 & 0x03030303u) | (words[2] >> 4 & 0x04040404u);
        codes[7] = (words[1] >> 6 & 0x03030303u) | (words[2] >> 5 & 0x04040404u);
    }

    __device__ static inline void factors(const Stored &stored, const u32 (&)[LINES], int block, int row,
                                          int (&scales)[2], int (&)[2]) {
        u32 low[2], high[2];
        numbers(stored, row, low, high);
        bool odd = block % 2 != 0;
        scales[0] = (int)(odd ? high[0] : low[0]) - 32, scales[1] = (int)(odd ? high[1] : low[1]) - 32;
    }
};

struct Q2 : NoLookup, Superblock<21, 5, 2, 2, 0, 2> {
    struct Stored {
        uint4 nibbles;

        __device__ inline void load(const u8 *superblock, int block, int quad) {
            nibbles = load_stream(superblock + 64 + 64 * (block / 2) + 16 * quad);
        }
    };

    __device__ static inline void decode(const Lookup &, const u32 (&words)[LINES], u32 (&codes)[8]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            codes[j] = words[0] >> (2 * j) & 0x03030303u;
            codes[4 + j] = words[1] >> (2 * j) & 0x03030303u;
        }
    }

    __device__ static inline void factors(const Stored &stored, const u32 (&)[LINES], int block, int row,
                                          int (&scales)[2], int (&least)[2]) {
        const uint4 &all = stored.nibbles;
        u32 own = (row < 2 ? (row == 0 ? all.x : all.y) : (row == 2 ? all.z : all.w)) >> (4 * (block % 2));
        scales[0] = (int)(own & 15), scales[1] = (int)(own >> 16 & 15);
        least[0] = (int)(own >> 8 & 15), least[1] = (int)(own >> 24 & 15);
    }
};

// The points of the lattice (kernels/iquants.py): eight two-bit digits, lowest first.
__device__ const u16 LATTICE_WORDS[256] = {
    0x0000, 0x0002, 0x0005, 0x0008, 0x000a, 0x0011, 0x0014, 0x0020, 0x0022, 0x0028, 0x002a, 0x0041, 0x0044, 0x0050,
    0x0058, 0x0061, 0x0064, 0x0080, 0x0082, 0x008a, 0x00a2, 0x0101, 0x0104, 0x0110, 0x0115, 0x0140, 0x0184, 0x0198,
    0x0200, 0x0202, 0x0222, 0x0282, 0x0401, 0x0404, 0x0410, 0x0421, 0x0424, 0x0440, 0x0442, 0x0448, 0x0460, 0x0481,
    0x0484, 0x0490, 0x04a4, 0x0500, 0x0502, 0x0508, 0x0520, 0x0546, 0x0569, 0x0580, 0x0591, 0x0609, 0x0610, 0x0640,
    0x0684, 0x06a4, 0x0800, 0x0805, 0x0808, 0x0814, 0x0828, 0x0841, 0x0844, 0x0850, 0x0852, 0x0888, 0x0904, 0x0940,
    0x0a02, 0x0a14, 0x1001, 0x1004, 0x1010, 0x1021, 0x1040, 0x1060, 0x1084, 0x1090, 0x1095, 0x1100, 0x1108, 0x1120,
    0x1150, 0x115a, 0x1180, 0x1224, 0x1245, 0x1400, 0x1408, 0x1420, 0x1425, 0x1449, 0x1480, 0x1518, 0x1562, 0x1600,
    0x1616, 0x1801, 0x1804, 0x1810, 0x1840, 0x1881, 0x1900, 0x1905, 0x19a0, 0x1a51, 0x2000, 0x2002, 0x200a, 0x2044,
    0x2061, 0x2080, 0x2082, 0x2129, 0x2148, 0x2200, 0x2202, 0x2401, 0x2404, 0x2410, 0x2440, 0x2456, 0x2500, 0x2541,
    0x2564, 0x2690, 0x2808, 0x2820, 0x2894, 0x2a44, 0x4001, 0x4004, 0x4010, 0x4018, 0x4021, 0x4024, 0x4040, 0x4048,
    0x4056, 0x4060, 0x4081, 0x4084, 0x4090, 0x4100, 0x4120, 0x4161, 0x4180, 0x4185, 0x4201, 0x4210, 0x4248, 0x4256,
    0x4268, 0x4400, 0x4408, 0x4420, 0x4480, 0x4499, 0x4512, 0x4524, 0x4600, 0x4801, 0x4804, 0x4810, 0x4840, 0x4845,
    0x4900, 0x4958, 0x4961, 0x4982, 0x4a45, 0x4a90, 0x5000, 0x5008, 0x5011, 0x5019, 0x5020, 0x5080, 0x5088, 0x5104,
    0x5142, 0x51a4, 0x5291, 0x5490, 0x5492, 0x550a, 0x5601, 0x5654, 0x5800, 0x5811, 0x5819, 0x5864, 0x5940, 0x5a08,
    0x6004, 0x6010, 0x6040, 0x6068, 0x6100, 0x6155, 0x6218, 0x6260, 0x6400, 0x6405, 0x6510, 0x6512, 0x6584, 0x6842,
    0x8000, 0x8002, 0x800a, 0x8041, 0x8082, 0x8104, 0x8118, 0x8140, 0x8211, 0x8401, 0x8404, 0x8410, 0x8415, 0x8440,
    0x8460, 0x8500, 0x8546, 0x8594, 0x8609, 0x8640, 0x8660, 0x8802, 0x8904, 0x8a11, 0x9004, 0x9010, 0x9024, 0x9040,
    0x90a1, 0x9116, 0x9180, 0x9245, 0x9400, 0x9422, 0x9444, 0x9551, 0x9881, 0x9920, 0xa002, 0xa050, 0xa085, 0xa109,
    0xa200, 0xa418, 0xa850, 0xa904};

struct Iq2 : Superblock<17, 1, 2, 1, 0, 1> {
    struct Stored {
        __device__ inline void load(const u8 *, int, int) {}
    };

    // The magnitudes of each point, for all threads of a block, of which each has to make the lookup.
    struct Lookup {
        const uint2 *points;
    };
    __device__ static inline uint2 *points() {
        __shared__ uint2 all[256];
        return all;
    }
    __device__ static inline Lookup lookup() {
        for (int point = threadIdx.x; point < 256; point += blockDim.x) {
            u32 word = LATTICE_WORDS[point], halves[2] = {0, 0};
            for (int i = 0; i < 8; ++i)
                halves[i / 4] |= (0x2b2b1908u >> (8 * (word >> (2 * i) & 3)) & 255) << (8 * (i % 4));
            points()[point] = make_uint2(halves[0], halves[1]);
        }
        __syncthreads();
        return {points()};
    }

    // The magnitudes of four columns with the signs that the uppermost bits of four bytes are.
    __device__ static inline u32 with_signs(u32 magnitudes, u32 signs) {
        u32 minus = permute_bytes(signs, 0, 0xba98);
        return (magnitudes ^ minus) + (minus & 0x01010101u);
    }

    // Eight columns: a byte of the first word, and of the second one, is a point and its signs. Bits 2,
    // 5, 3, 4 of signs, and 6, 1, (odd), 0 go to the tops of four bytes: products with sums of powers
    // of two, in which no two bits meet.
    __device__ static inline uint2 columns(const uint2 *points, const u32 (&words)[LINES], int byte) {
        u32 signs = words[1] >> (8 * byte), odd = (u32)__popc(signs & 127) & 1;
        uint2 magnitudes = points[words[0] >> (8 * byte) & 255];
        return make_uint2(with_signs(magnitudes.x, (signs & 0x3c) * 0x08100420u),
                          with_signs(magnitudes.y, ((signs & 0x43) | odd << 2) * 0x80204002u));
    }

    __device__ static inline void decode(const Lookup &lookup, const u32 (&words)[LINES], u32 (&codes)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint2 both = columns(lookup.points, words, i);
            codes[2 * i] = both.x, codes[2 * i + 1] = both.y;
        }
    }

    __device__ static inline void factors(const Stored &, const u32 (&words)[LINES], int, int,
                                          int (&scales)[1], int (&)[1]) {
        scales[0] = dot4(words[1] >> 7 & 0x01010101u, 0x10080402u, 1);
    }
};
