// The GEMMs of an LM head on a CPU with AMX, as accurate as fp32 ones: a number is split into bf16
// terms (three hold all 24 bits, two hold 16), and products of terms are added up in fp32 tiles;
// what is dropped is below 2^-24 (2^-16) of a product. A bf16 number is one term, and exact.
//
// Operands are packed into tiles of 16 x 32 numbers; the one that a call reads again and again is
// packed once, the others in panels that fit the second cache. A result never depends on threads.
// Not as fp32 GEMMs: numbers below 1e-32 lose bits, and an infinity makes NaN.

#include <cstdint>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cpuid.h>
#include <immintrin.h>

#include "fingerprint.h"

#define INLINE inline __attribute__((always_inline))

extern "C" {

// Mirrored field by field in gemm.py.
struct Gemm {
  const void *left, *right;
  float* out;
  uint8_t *shared, *own;  // packed operands: one, and one for each thread
  int64_t left_stride, right_stride, out_stride;  // in elements
  int64_t rows, width, columns;                   // R, K, V
  int64_t next;                                   // the next panel that no thread has taken
  int32_t role, left_half, right_half, terms, add;
};

}  // extern "C"

namespace {

enum Role { PROJECT, HIDDEN_GRADIENT, WEIGHT_GRADIENT };

constexpr int64_t SIDE = 32;               // of a block of 2 x 2 tiles, and the depth of a step
constexpr int64_t TILE = 1024;             // bytes
constexpr int64_t PAIR = 2 * TILE;         // two tiles: 32 x 32 numbers, one term
constexpr int64_t BLOCK = 4 * TILE;        // 32 x 32 sums
constexpr int64_t CHUNK = 768 * 1024;      // of the shared operand: stays in the second cache
constexpr int64_t PANEL = 512 * 1024;      // of a thread's own
constexpr int64_t DEPTH = 8;               // steps of the hidden gradient between fp32 additions

int64_t steps_of(int64_t n) { return (n + SIDE - 1) / SIDE; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- packing -----------------------------------------------------------------------------------

struct Half {  // bf16
  uint16_t bits;
};

INLINE uint32_t first(int64_t n) { return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1; }
INLINE __mmask16 first16(int64_t n) { return static_cast<__mmask16>(first(n < 16 ? n : 16)); }

INLINE __m512 load16(const float* at, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, at); }
INLINE __m512 load16(const Half* at, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE __m512 rounded(__m512 x) {  // to bf16, ties away from zero
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_epi32(up, _mm512_set1_epi32(0xFFFF0000)));
}

INLINE __m512i together(__m512 even, __m512 odd) {  // pairs of bf16
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(odd));
}

template <int TERMS>
INLINE void split(__m512 x, __m512 y, __m512i* terms) {
  if constexpr (TERMS == 1) {
    terms[0] = together(x, y);
  } else {
    const __m512 hx = rounded(x), hy = rounded(y);
    terms[0] = together(hx, hy);
    const __m512 rx = _mm512_sub_ps(x, hx), ry = _mm512_sub_ps(y, hy);
    if constexpr (TERMS == 2) {  // a NaN of ones would round to zero
      const __mmask16 nx = _mm512_cmp_ps_mask(rx, rx, _CMP_UNORD_Q);
      const __mmask16 ny = _mm512_cmp_ps_mask(ry, ry, _CMP_UNORD_Q);
      terms[1] = together(_mm512_mask_blend_ps(nx, rounded(rx), rx),
                          _mm512_mask_blend_ps(ny, rounded(ry), ry));
    } else {
      const __m512 mx = rounded(rx), my = rounded(ry);
      terms[1] = together(mx, my);
      terms[2] = together(_mm512_sub_ps(rx, mx), _mm512_sub_ps(ry, my));  // exact
    }
  }
}

INLINE void transpose(__m512i* r) {  // 16 x 16 words
  __m512i s[16];
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(s[4 * i + j], s[4 * i + j + 2]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(s[4 * i + j], s[4 * i + j + 2]);
    }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      s[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0x88);
      s[8 * i + j + 4] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0xDD);
  }
}

// How memory lies: ALONG, the numbers of one sum are neighbours; ACROSS, they are in one column.
enum Layout { ALONG, ACROSS };

// 32 x 32 numbers into two tiles for each term: [term][2][16][16 pairs]. A pair is the numbers i
// and i + 16 of a sum; with PLAIN (both operands in bf16, along) neighbours. TURN: as a right
// operand where memory has it along, as a left one where it has it across.
template <class T, int TERMS, Layout LAYOUT, bool TURN, bool PLAIN>
void pack(const void* from, int64_t stride, int64_t outer, int64_t depth, uint8_t* to) {
  const T* source = static_cast<const T*>(from);
  for (int half = 0; half < 2; ++half, outer -= 16) {
    uint8_t* tile = to + half * TILE;
    const __mmask16 columns = first16(outer), low = first16(depth), high = first16(depth - 16);
    for (int i = 0; i < 16; ++i) {
      __m512i terms[TERMS];
      if constexpr (PLAIN) {
        const T* row = source + (16 * half + i) * stride;
        terms[0] = _mm512_maskz_loadu_epi16(i < outer ? first(depth) : 0, row);
      } else if constexpr (LAYOUT == ALONG) {
        const T* row = source + (16 * half + i) * stride;
        split<TERMS>(load16(row, i < outer ? low : 0), load16(row + 16, i < outer ? high : 0),
                     terms);
      } else {
        const T* row = source + i * stride + 16 * half;
        split<TERMS>(load16(row, i < depth ? columns : 0),
                     load16(row + 16 * stride, i + 16 < depth ? columns : 0), terms);
      }
      for (int t = 0; t < TERMS; ++t)
        _mm512_store_si512(tile + t * PAIR + i * 64, terms[t]);
    }
    if constexpr (TURN)
      for (int t = 0; t < TERMS; ++t) {
        __m512i rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(tile + t * PAIR + i * 64);
        transpose(rows);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + t * PAIR + i * 64, rows[i]);
      }
  }
}

using Pack = void (*)(const void*, int64_t, int64_t, int64_t, uint8_t*);

template <Layout LAYOUT, bool TURN>
Pack packer(bool half, int terms, bool plain) {
  if (half && plain && LAYOUT == ALONG) return pack<Half, 1, ALONG, TURN, true>;
  if (half) return pack<Half, 1, LAYOUT, TURN, false>;
  return terms == 2 ? pack<float, 2, LAYOUT, TURN, false> : pack<float, 3, LAYOUT, TURN, false>;
}

// ---- sums --------------------------------------------------------------------------------------

// Fetches the lines of a coming panel, a few at each step of a block.
struct Ahead {
  const char* at;
  int64_t stride, lines, rows, each;  // stride in bytes
  int64_t line = 0;

  INLINE void some() {
    for (int64_t n = each; n > 0 && rows > 0; --n) {
      _mm_prefetch(at + 64 * line, _MM_HINT_T1);
      if (++line == lines) line = 0, at += stride, --rows;
    }
  }
};

#define LEFT(term)                                        \
  _tile_loadd(4, left + (term) * PAIR, 64);               \
  _tile_loadd(5, left + (term) * PAIR + TILE, 64)
#define RIGHT(term)                                       \
  _tile_loadd(6, right + (term) * PAIR, 64);              \
  _tile_loadd(7, right + (term) * PAIR + TILE, 64)
#define PRODUCT()                                         \
  _tile_dpbf16ps(0, 4, 6);                                \
  _tile_dpbf16ps(1, 4, 7);                                \
  _tile_dpbf16ps(2, 5, 6);                                \
  _tile_dpbf16ps(3, 5, 7)

// 32 x 32 sums over `steps` steps, on top of what there is or from zero.
template <int L, int R>
__attribute__((noinline)) void block(const uint8_t* left, const uint8_t* right, int64_t steps,
                                     float* sums, bool more, Ahead* ahead) {
  asm volatile("" ::: "memory");  // what was packed is in memory
  if (more) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; steps > 0; --steps, left += L * PAIR, right += R * PAIR) {
    if (ahead) ahead->some();
    LEFT(0);
    if constexpr (L == 1 && R == 1) {
      RIGHT(0);
      PRODUCT();
    } else if constexpr (R == 1) {
      RIGHT(0);
      PRODUCT();
      LEFT(1);
      PRODUCT();
      if constexpr (L == 3) {
        LEFT(2);
        PRODUCT();
      }
    } else if constexpr (L == 1) {
      RIGHT(0);
      PRODUCT();
      RIGHT(1);
      PRODUCT();
      if constexpr (R == 3) {
        RIGHT(2);
        PRODUCT();
      }
    } else if constexpr (L == 2) {
      RIGHT(1);
      PRODUCT();
      RIGHT(0);
      PRODUCT();
      LEFT(1);
      PRODUCT();
    } else {
      RIGHT(2);
      PRODUCT();
      RIGHT(1);
      PRODUCT();
      LEFT(1);
      PRODUCT();
      RIGHT(0);
      PRODUCT();
      LEFT(2);
      PRODUCT();
      LEFT(0);
      PRODUCT();
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  asm volatile("" ::: "memory");
}

using Block = void (*)(const uint8_t*, const uint8_t*, int64_t, float*, bool, Ahead*);

Block blocker(int left, int right) {
  static const Block table[3][3] = {{block<1, 1>, block<1, 2>, block<1, 3>},
                                    {block<2, 1>, block<2, 2>, nullptr},
                                    {block<3, 1>, nullptr, block<3, 3>}};
  return table[left - 1][right - 1];
}

// 32 x 32 sums to their place, or on top of what is there.
void put(const float* sums, float* out, int64_t stride, int64_t rows, int64_t columns, bool add) {
  const __mmask16 low = first16(columns), high = first16(columns - 16);
  for (int64_t i = 0; i < least(rows, SIDE); ++i) {
    const float* from = sums + (i / 16) * 512 + (i % 16) * 16;
    float* to = out + i * stride;
    __m512 x = _mm512_load_ps(from), y = _mm512_load_ps(from + 256);
    if (add) {
      x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(low, to));
      y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(high, to + 16));
    }
    _mm512_mask_storeu_ps(to, low, x);
    _mm512_mask_storeu_ps(to + 16, high, y);
  }
}

// The same, transposed.
void put_turned(const float* sums, float* out, int64_t stride, int64_t rows, int64_t columns) {
  for (int r = 0; r < 2; ++r)
    for (int c = 0; c < 2; ++c) {
      const __mmask16 mask = first16(columns - 16 * c);
      __m512i lines[16];
      for (int i = 0; i < 16; ++i)
        lines[i] = _mm512_load_si512(sums + (2 * c + r) * 256 + i * 16);
      transpose(lines);
      for (int i = 0; i < 16; ++i)
        if (16 * r + i < rows)
          _mm512_mask_storeu_epi32(out + (16 * r + i) * stride + 16 * c, mask, lines[i]);
    }
}

// ---- the three GEMMs ---------------------------------------------------------------------------

int64_t size_of(bool half) { return half ? 2 : 4; }
const char* at(const void* base, bool half, int64_t element) {
  return static_cast<const char*>(base) + element * size_of(half);
}

// Sizes in blocks of 32 and steps of 32, and how they are cut; equal for all threads.
struct Cut {
  int left, right;           // terms
  int64_t rows, width, columns;
  int64_t chunk, chunks;     // of the shared operand: steps (PROJECT) or blocks (WEIGHT_GRADIENT)
  int64_t panel, panels;     // blocks of the vocabulary at a time
  int64_t shared, own;       // bytes

  explicit Cut(const Gemm& g)
      : left(g.left_half ? 1 : g.terms),
        right(g.right_half ? 1 : g.terms),
        rows(steps_of(g.rows)),
        width(steps_of(g.width)),
        columns(steps_of(g.columns)),
        chunk(1), chunks(1), panel(1), panels(1), shared(0), own(0) {
    if (g.role == PROJECT) {
      cut(width, rows * left * PAIR);
      shared = rows * width * left * PAIR;
      panel = chunks == 1 ? 8 : most(1, PANEL / (rows * BLOCK));
      own = (chunks == 1 ? 1 : panel) * rows * BLOCK + chunk * right * PAIR;
    } else if (g.role == WEIGHT_GRADIENT) {
      cut(width, rows * right * PAIR);
      shared = rows * width * right * PAIR;
      panel = most(1, PANEL / (rows * left * PAIR));
      own = panel * rows * left * PAIR + BLOCK;
    } else {
      chunk = most(1, least(width, PANEL / 2 / (DEPTH * right * PAIR)));
      own = (rows * left + chunk * right) * DEPTH * PAIR + BLOCK;
    }
    panel = most(1, least(panel, columns));
    panels = (columns + panel - 1) / panel;
  }

  void cut(int64_t whole, int64_t bytes) {  // evenly
    chunks = most(1, (whole * bytes + CHUNK - 1) / CHUNK);
    chunk = most(1, (whole + chunks - 1) / chunks);
    chunks = most(1, (whole + chunk - 1) / chunk);
  }
};

// The operand that all threads read; `part` of `parts`.
void pack_shared(const Gemm& g, int64_t part, int64_t parts) {
  const Cut cut(g);
  if (g.role == PROJECT) {  // [chunk][block of rows][step][term]: hidden states
    const Pack pack = packer<ALONG, true>(g.left_half, g.terms, g.right_half);
    for (int64_t s = cut.width * part / parts; s < cut.width * (part + 1) / parts; ++s) {
      const int64_t start = s / cut.chunk * cut.chunk, own = least(cut.chunk, cut.width - start);
      for (int64_t r = 0; r < cut.rows; ++r)
        pack(at(g.left, g.left_half, r * SIDE * g.left_stride + s * SIDE), g.left_stride,
             g.rows - r * SIDE, g.width - s * SIDE,
             g.shared + (start * cut.rows + r * own + s - start) * cut.left * PAIR);
    }
  } else if (g.role == WEIGHT_GRADIENT) {  // [block of columns][step of rows][term]: the same
    const Pack pack = packer<ACROSS, false>(g.right_half, g.terms, false);
    for (int64_t c = cut.width * part / parts; c < cut.width * (part + 1) / parts; ++c)
      for (int64_t r = 0; r < cut.rows; ++r)
        pack(at(g.right, g.right_half, r * SIDE * g.right_stride + c * SIDE), g.right_stride,
             g.width - c * SIDE, g.rows - r * SIDE,
             g.shared + (c * cut.rows + r) * cut.right * PAIR);
  }
}

int64_t take(Gemm& g) { return __atomic_fetch_add(&g.next, 1, __ATOMIC_RELAXED); }

// out (R, V) = hidden (R, K) @ weight (V, K)^T, as weight @ hidden^T turned over.
void project(Gemm& g, const Cut& cut, uint8_t* own) {
  const Pack pack = packer<ALONG, false>(g.right_half, g.terms, g.left_half);
  const Block block = blocker(cut.right, cut.left);
  uint8_t* packed = own;
  uint8_t* sums = own + cut.chunk * cut.right * PAIR;
  const int64_t bytes = size_of(g.right_half), rest = cut.chunks > 1;
  for (int64_t panel; (panel = take(g)) < cut.panels;) {
    const int64_t begin = panel * cut.panel, end = least(cut.columns, begin + cut.panel);
    for (int64_t start = 0; start < cut.width; start += cut.chunk) {
      const int64_t steps = least(cut.chunk, cut.width - start);
      for (int64_t v = begin; v < end; ++v) {
        const char* from = at(g.right, g.right_half, v * SIDE * g.right_stride + start * SIDE);
        for (int64_t s = 0; s < steps; ++s)
          pack(from + s * SIDE * bytes, g.right_stride, g.columns - v * SIDE,
               g.width - (start + s) * SIDE, packed + s * cut.right * PAIR);
        const int64_t lines = (steps * SIDE * bytes + 63) / 64;
        Ahead ahead{from + SIDE * g.right_stride * bytes, g.right_stride * bytes, lines,
                    most(0, least(SIDE, g.columns - (v + 1) * SIDE)),
                    lines * SIDE / (steps * cut.rows) + 1};
        if (v + 1 == end && start + steps < cut.width)  // back to the panel's first block
          ahead.at = at(g.right, g.right_half, begin * SIDE * g.right_stride) +
                     (start + steps) * SIDE * bytes;
        for (int64_t r = 0; r < cut.rows; ++r) {
          float* own_sums =
              reinterpret_cast<float*>(sums + (rest * (v - begin) * cut.rows + r) * BLOCK);
          block(packed, g.shared + (start * cut.rows + r * steps) * cut.left * PAIR, steps,
                own_sums, start > 0, &ahead);
          if (start + steps == cut.width)
            put_turned(own_sums, g.out + r * SIDE * g.out_stride + v * SIDE, g.out_stride,
                       g.rows - r * SIDE, g.columns - v * SIDE);
        }
      }
    }
  }
}

// out (V, K) (+)= grad (R, V)^T @ hidden (R, K).
void weight_gradient(Gemm& g, const Cut& cut, uint8_t* own) {
  const Pack pack = packer<ACROSS, true>(g.left_half, g.terms, false);
  const Block block = blocker(cut.left, cut.right);
  float* sums = reinterpret_cast<float*>(own);
  uint8_t* packed = own + BLOCK;
  const int64_t pack_size = cut.rows * cut.left * PAIR;
  for (int64_t panel; (panel = take(g)) < cut.panels;) {
    const int64_t begin = panel * cut.panel, end = least(cut.columns, begin + cut.panel);
    for (int64_t s = 0; s < cut.rows; ++s)
      for (int64_t v = begin; v < end; ++v)
        pack(at(g.left, g.left_half, s * SIDE * g.left_stride + v * SIDE), g.left_stride,
             g.columns - v * SIDE, g.rows - s * SIDE,
             packed + (v - begin) * pack_size + s * cut.left * PAIR);
    for (int64_t start = 0; start < cut.width; start += cut.chunk)
      for (int64_t v = begin; v < end; ++v)
        for (int64_t c = start; c < least(cut.width, start + cut.chunk); ++c) {
          block(packed + (v - begin) * pack_size, g.shared + c * cut.rows * cut.right * PAIR,
                cut.rows, sums, false, nullptr);
          put(sums, g.out + v * SIDE * g.out_stride + c * SIDE, g.out_stride,
              g.columns - v * SIDE, g.width - c * SIDE, g.add);
        }
  }
}

// out (R, K) += grad (R, V) @ weight (V, K); a thread has columns of its own.
void hidden_gradient(Gemm& g, const Cut& cut, uint8_t* own, int64_t begin, int64_t end) {
  const Pack pack_left = packer<ALONG, false>(g.left_half, g.terms, false);
  const Pack pack_right = packer<ACROSS, false>(g.right_half, g.terms, false);
  const Block block = blocker(cut.left, cut.right);
  float* sums = reinterpret_cast<float*>(own);
  uint8_t* right = own + BLOCK;
  uint8_t* left = right + cut.chunk * DEPTH * cut.right * PAIR;
  for (int64_t start = 0; start < cut.columns; start += DEPTH) {
    const int64_t steps = least(DEPTH, cut.columns - start);
    const int64_t left_size = steps * cut.left * PAIR, right_size = steps * cut.right * PAIR;
    for (int64_t r = 0; r < cut.rows; ++r)
      for (int64_t s = 0; s < steps; ++s)
        pack_left(at(g.left, g.left_half, r * SIDE * g.left_stride + (start + s) * SIDE),
                  g.left_stride, g.rows - r * SIDE, g.columns - (start + s) * SIDE,
                  left + r * left_size + s * cut.left * PAIR);
    for (int64_t c = begin, stop; c < end; c = stop) {
      stop = least(end, c + cut.chunk);
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t i = c; i < stop; ++i)
          pack_right(
              at(g.right, g.right_half, (start + s) * SIDE * g.right_stride + i * SIDE),
              g.right_stride, g.width - i * SIDE, g.columns - (start + s) * SIDE,
              right + (i - c) * right_size + s * cut.right * PAIR);
      for (int64_t i = c; i < stop; ++i)
        for (int64_t r = 0; r < cut.rows; ++r) {
          block(left + r * left_size, right + (i - c) * right_size, steps, sums, false, nullptr);
          put(sums, g.out + r * SIDE * g.out_stride + i * SIDE, g.out_stride, g.rows - r * SIDE,
              g.width - i * SIDE, true);
        }
    }
  }
}

// Numbers below the least normal one are zeros to the tile unit, and slow elsewhere.
struct Flush {
  unsigned before = _mm_getcsr();
  Flush() { _mm_setcsr(before | 0x8040); }
  ~Flush() { _mm_setcsr(before); }
};

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace

extern "C" {

// Whether this machine has the instructions and lets this process use them.
int dudi_gemm_ready() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0;  // AVX512_BF16
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return 0;
#endif
}

// Bytes of the shared buffer, and of each thread's own.
void dudi_gemm_bytes(const Gemm* g, int64_t* shared, int64_t* own) {
  const Cut cut(*g);
  *shared = cut.shared;
  *own = cut.own;
}

void dudi_gemm_pack(const Gemm* g, int64_t part, int64_t parts) {
  const Flush flush;
  pack_shared(*g, part, parts);
}

void dudi_gemm(Gemm* g, int64_t part, int64_t parts) {
  const Cut cut(*g);
  uint8_t* own = g->own + part * cut.own;
  const Flush flush;
  const Config config;
  _tile_loadconfig(&config);
  if (g->role == PROJECT)
    project(*g, cut, own);
  else if (g->role == WEIGHT_GRADIENT)
    weight_gradient(*g, cut, own);
  else
    hidden_gradient(*g, cut, own, cut.width * part / parts, cut.width * (part + 1) / parts);
  _tile_release();
}

const char* dudi_fingerprint() { return DUDI_FINGERPRINT; }

}  // extern "C"
