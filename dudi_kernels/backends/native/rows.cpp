// The element-wise part of a fused loss on a CPU: logits of a tile in, statistics, sums and (in
// place) the gradient of the raw logits out, one row after the other, with no temporary.
//
// A row is walked in segments that fit the first cache; fp32 partial sums of a segment are added up
// in double. The caller splits rows over threads: a row's result never depends on the split.
// divergences.h is generated from dudi_kernels/divergences.py (generate.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fingerprint.h"

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr float FLOOR = -1e38f;  // stands for log 0, as in divergences.py
constexpr float TINY = 2e-38f;
constexpr float HEAD_MASS = 0.5f;  // as there
constexpr int64_t SEGMENT = 2048;

template <class To, class From>
inline To bits(From value) {
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// e^x of x < 88, within 2 units in the last place; 0 below the least normal number; NaN stays NaN.
INLINE float exp_(float x) {
  const float y = x < -87.3f ? -87.3f : x;
  const float shifted = y * 1.44269504f + 12582912.f;  // the integer part, in the low bits
  const float n = shifted - 12582912.f;
  float r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t power = (bits<int32_t>(shifted) - 0x4B400000 + 127) << 23;
  const float result = p * bits<float>(power);
  return x < -87.3f ? 0.f : result;
}

// log x of a positive normal x; NaN stays NaN.
INLINE float log_(float x) {
  const int32_t raw = bits<int32_t>(x) - 0x3F3504F3;  // mantissa in [sqrt(1/2), sqrt(2))
  const float e = static_cast<float>(raw >> 23);
  const float f = bits<float>((raw & 0x007FFFFF) + 0x3F3504F3) - 1.f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  float tail = p * f * square - 2.12194440e-4f * e - 0.5f * square;
  return f + tail + 0.693359375f * e + (x - x);
}

// power - cross (1 + u), power = cross e^u and u = rate gap: by series where it cancels.
INLINE float remainder(float u, float power, float cross, float gap, float rate) {
  float series = 1.f + u * (1.f / 11);
  series = 1.f + u * (1.f / 10) * series;
  series = 1.f + u * (1.f / 9) * series;
  series = 1.f + u * (1.f / 8) * series;
  series = 1.f + u * (1.f / 7) * series;
  series = 1.f + u * (1.f / 6) * series;
  series = 1.f + u * (1.f / 5) * series;
  series = 1.f + u * (1.f / 4) * series;
  series = 1.f + u * (1.f / 3) * series;
  const float near = cross * (0.5f * u * u * series), far = power - cross - cross * gap * rate;
  return std::fabs(u) < 1.f ? near : far;  // no 0 * inf
}

INLINE float floored(float x) { return x < FLOOR ? FLOOR : x; }

#include "divergences.h"

}  // namespace

#include "maps.h"

namespace {

struct None {  // no divergence: log-probabilities and entropy alone
  static constexpr bool taught = false;
  static constexpr int helpers = 0, chain = 1;
  static INLINE void terms(float, float, float, float, float, float, float, float, float,
                           float& phi, float& g) {
    phi = g = 0.f;
  }
};

}  // namespace

extern "C" {

// Mirrored field by field in __init__.py.
struct Tile {
  float* student;        // (rows, columns) logits; the gradient of the raw ones where asked for
  const float* teacher;  // or null
  int64_t student_stride, teacher_stride, columns, first_column, vocabulary;
  const int64_t* targets;  // or null
  double *log_sum, *tempered_log_sum, *teacher_log_sum, *teacher_tempered_log_sum;
  float *target, *teacher_target;  // logits
  float *divergence, *g_sum, *entropy, *teacher_entropy;
  int32_t* poles;
  const float *weight, *coefficient, *entropy_weight;  // the latter two may be null
  float* mixture;                                      // each row's own a, or null
  float inv_tau, teacher_inv_tau, a, b, softcap, scale;
  int32_t measure, masked, smooth_mask, statistics, teacher_statistics, mix, sums, gradient;
};

}  // extern "C"

namespace {

double logaddexp(double a, double b) {
  const double top = a > b ? a : b;
  if (std::isinf(top)) return top + (a - a) * 0 + (b != b ? b : 0);
  return top + std::log(std::exp(a - top) + std::exp(b - top));
}

// log-sum-exp of a row's logits, and at another temperature, on top of what there was.
void statistics(const float* x, int64_t n, float inv_tau, double& one, double& other) {
  for (int64_t start = 0; start < n; start += SEGMENT) {
    const int64_t stop = start + SEGMENT < n ? start + SEGMENT : n;
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = start; i < stop; ++i) top = x[i] > top ? x[i] : top;
    if (top == -INFINITY) {  // all masked, or NaN
      float probe = 0.f;
      for (int64_t i = start; i < stop; ++i) probe += x[i] != x[i] ? x[i] : 0.f;
      one += probe;
      other += probe;
      continue;
    }
    float sum = 0.f, sum_tempered = 0.f, ones = 0.f;  // the tops apart: the rest is faint beside
    if (inv_tau == 1.f) {
#pragma omp simd reduction(+ : sum, ones)
      for (int64_t i = start; i < stop; ++i) {
        const float a = x[i] - top;
        sum += a == 0.f ? 0.f : exp_(a);
        ones += a == 0.f ? 1.f : 0.f;
      }
      sum_tempered = sum;
    } else {
#pragma omp simd reduction(+ : sum, sum_tempered, ones)
      for (int64_t i = start; i < stop; ++i) {
        const float a = x[i] - top;
        sum += a == 0.f ? 0.f : exp_(a);
        sum_tempered += a == 0.f ? 0.f : exp_(a * inv_tau);
        ones += a == 0.f ? 1.f : 0.f;
      }
    }
    const double whole = static_cast<double>(sum) + ones;
    const double whole_tempered = static_cast<double>(sum_tempered) + ones;
    one = logaddexp(one, top + std::log(whole));
    other = logaddexp(other, static_cast<double>(top) * inv_tau + std::log(whole_tempered));
  }
}

// Sums of e^x and of e^x y over a row, relative to a running maximum of x.
struct Moments {
  double top = -INFINITY, total = 0, first = 0, second = 0;

  void add(float segment_top, double z, double za, double zb) {
    const double higher = segment_top > top ? segment_top : top;
    const double old = top == -INFINITY ? 0. : std::exp(top - higher);
    const double now = std::exp(segment_top - higher);
    total = total * old + z * now;
    first = first * old + za * now;
    second = second * old + zb * now;
    top = higher;
  }
  double log_sum() const { return top + std::log(total); }
};

inline float top_of(const float* x, int64_t start, int64_t stop) {
  float top = -INFINITY, bad = 0.f;
#pragma omp simd reduction(max : top) reduction(+ : bad)
  for (int64_t i = start; i < stop; ++i) {
    top = x[i] > top ? x[i] : top;
    bad += x[i] - x[i];  // NaN where a logit is not finite
  }
  return top + bad;
}

// Statistics and sums of finite logits at temperature 1 in one walk: entropies and the two KLs are
// means of logits and of their differences.
template <class M>
void one_walk(const float* s, const float* t, int64_t n, const Tile& tile, int64_t r) {
  Moments student, teacher;
  for (int64_t start = 0; start < n; start += SEGMENT) {
    const int64_t stop = start + SEGMENT < n ? start + SEGMENT : n;
    const float top = top_of(s, start, stop), other = M::taught ? top_of(t, start, stop) : 0.f;
    float z = 0.f, zs = 0.f, zd = 0.f, v = 0.f, vt = 0.f, vd = 0.f;
    float ones = 0.f, others = 0.f;  // the tops themselves, apart: beside them the rest is faint
#pragma omp simd reduction(+ : z, zs, zd, v, vt, vd, ones, others)
    for (int64_t i = start; i < stop; ++i) {
      const float a = s[i] - top, q = exp_(a);
      z += a == 0.f ? 0.f : q;
      ones += a == 0.f ? 1.f : 0.f;
      zs += q * a;
      if constexpr (M::taught) {
        const float b = t[i] - other, p = exp_(b), difference = s[i] - t[i];
        v += b == 0.f ? 0.f : p;
        others += b == 0.f ? 1.f : 0.f;
        vt += p * b;
        if constexpr (M::chain == 1) vd += p * difference;
        if constexpr (M::chain == 2) zd += q * difference;
      }
    }
    const double mass = static_cast<double>(z) + ones, guide = static_cast<double>(v) + others;
    student.add(top, mass, zs + mass * top, zd);
    if constexpr (M::taught) teacher.add(other, guide, vt + guide * other, vd);
  }
  const double lse = student.log_sum();
  tile.log_sum[r] = tile.tempered_log_sum[r] = lse;
  tile.entropy[r] = static_cast<float>(lse - student.first / student.total);
  if constexpr (M::taught) {
    const double other = teacher.log_sum();
    tile.teacher_log_sum[r] = tile.teacher_tempered_log_sum[r] = other;
    tile.teacher_entropy[r] = static_cast<float>(other - teacher.first / teacher.total);
    double divergence;
    if constexpr (M::chain == 1) {
      divergence = lse - other - teacher.second / teacher.total;
      tile.g_sum[r] = -1.f;
    } else {
      divergence = student.second / student.total + other - lse;
      tile.g_sum[r] = static_cast<float>(1 + divergence);
    }
    tile.divergence[r] = static_cast<float>(divergence);
  }
}

// A log-sum-exp in two floats: taken off one after the other, a log-probability is as exact as its
// logit, however large that is.
struct Sum {
  float high, low;
  explicit Sum(double value)
      : high(static_cast<float>(value)),
        low(std::isinf(high) ? 0.f : static_cast<float>(value - high)) {}
  INLINE float off(float x) const { return floored((x - high) - low); }
};

// What the passes over a row read.
struct Row {
  Sum log_sum, tempered, teacher_log_sum, teacher_tempered;
  float inv_tau, teacher_inv_tau, a, b;
};

template <class M, bool TEMPERED>
INLINE void terms_at(float s, float t, const Row& row, float& lq1, float& q1, float& lp1, float& p1,
                     float& q, float& lq, float& p, float& lp, float& phi, float& g) {
  lq1 = row.log_sum.off(s);
  q1 = exp_(lq1);
  phi = g = q = lq = p = lp = p1 = lp1 = 0.f;
  if constexpr (M::taught) {
    lp1 = row.teacher_log_sum.off(t);
    p1 = exp_(lp1);
    if constexpr (TEMPERED) {
      lq = row.tempered.off(s * row.inv_tau);
      lp = row.teacher_tempered.off(t * row.teacher_inv_tau);
      q = exp_(lq);
      p = exp_(lp);
    } else {
      lq = lq1, lp = lp1, q = q1, p = p1;
    }
    float x = 0.f, y = 0.f, z = 0.f;
    if constexpr (M::helpers == 1) {
      x = row.a * p + (1.f - row.a) * q;
      x = x < TINY ? TINY : x;
      y = log_(x);
    } else if constexpr (M::helpers == 2) {
      const float gap = lp - lq, cross = exp_(row.a * lp + row.b * lq);
      const float power = exp_((row.a + row.b) * lq);
      y = remainder(row.b * gap, exp_((row.a + row.b) * lp), cross, gap, row.b);
      z = remainder(-row.a * gap, power, cross, gap, -row.a);
      x = std::fabs(row.a * gap) < 1.f ? z - cross * gap * row.a : power - cross;
    }
    M::terms(p, lp, q, lq, x, y, z, row.a, row.b, phi, g);
  }
}

struct Token {
  float p, gap;
  int32_t id;
  bool operator<(const Token& other) const {  // of equals the first comes out of a heap first
    return p < other.p || (p == other.p && id > other.id);
  }
};

// A row's own a (adaptive.py). Tokens with less than an nth of a quarter have together less than a
// quarter of the mass, so that the head ends before them; the others come out of a heap, in order.
template <bool TEMPERED>
float forward_share(const float* s, const float* t, int64_t n, const Row& row,
                    std::vector<Token>& heap) {
  const Sum& student = TEMPERED ? row.tempered : row.log_sum;
  const Sum& teacher = TEMPERED ? row.teacher_tempered : row.teacher_log_sum;
  const float least = (1.f - HEAD_MASS) / 2.f / static_cast<float>(n);
  float p[SEGMENT], gap[SEGMENT];
  double total = 0;
  heap.clear();
  for (int64_t start = 0; start < n; start += SEGMENT) {
    const int64_t size = start + SEGMENT < n ? SEGMENT : n - start;
    float sum = 0.f, top = 0.f;
#pragma omp simd reduction(+ : sum) reduction(max : top)
    for (int64_t i = 0; i < size; ++i) {
      const float u = s[start + i], v = t[start + i];
      const float q = exp_(student.off(TEMPERED ? u * row.inv_tau : u));
      p[i] = exp_(teacher.off(TEMPERED ? v * row.teacher_inv_tau : v));
      gap[i] = std::fabs(p[i] - q);
      sum += gap[i];
      top = p[i] > top ? p[i] : top;
    }
    total += sum;
    if (top < least) continue;
    for (int64_t i = 0; i < size; ++i)
      if (p[i] >= least) heap.push_back({p[i], gap[i], static_cast<int32_t>(start + i)});
  }
  if (total == 0) return 0.5f;
  std::make_heap(heap.begin(), heap.end());
  double mass = 0, head = 0;
  for (auto end = heap.end(); end != heap.begin(); --end) {
    const Token& token = heap.front();
    mass += token.p;
    if (mass > HEAD_MASS && end != heap.end()) break;
    head += token.gap;
    std::pop_heap(heap.begin(), end);
  }
  return static_cast<float>(head / total);  // NaN where a logit is
}

template <class M, bool TEMPERED>
void sums(const float* s, const float* t, int64_t n, const Row& row, const Tile& tile, int64_t r) {
  double divergence = 0, g_sum = 0, entropy = 0, teacher_entropy = 0;
  for (int64_t start = 0; start < n; start += SEGMENT) {
    const int64_t stop = start + SEGMENT < n ? start + SEGMENT : n;
    float d = 0.f, gs = 0.f, h = 0.f, th = 0.f;
#pragma omp simd reduction(+ : d, gs, h, th)
    for (int64_t i = start; i < stop; ++i) {
      float lq1, q1, lp1, p1, q, lq, p, lp, phi, g;
      terms_at<M, TEMPERED>(s[i], M::taught ? t[i] : 0.f, row, lq1, q1, lp1, p1, q, lq, p, lp, phi,
                            g);
      d += phi;
      gs += g;
      h -= q1 * lq1;
      th -= p1 * lp1;
    }
    divergence += d, g_sum += gs, entropy += h, teacher_entropy += th;
  }
  tile.entropy[r] += static_cast<float>(entropy);
  if constexpr (M::taught) {
    tile.divergence[r] += static_cast<float>(divergence);
    tile.g_sum[r] += static_cast<float>(g_sum);
    tile.teacher_entropy[r] += static_cast<float>(teacher_entropy);
    if (tile.masked) {  // where one side masks a token that the other gives mass
      int32_t poles = 0;
      for (int64_t i = 0; i < n; ++i) {
        float lq1, q1, lp1, p1, q, lq, p, lp, phi, g;
        terms_at<M, TEMPERED>(s[i], t[i], row, lq1, q1, lp1, p1, q, lq, p, lp, phi, g);
        poles |= (lq <= FLOOR && p > 0.f ? 1 : 0) | (lp <= FLOOR && q > 0.f ? 2 : 0);
      }
      tile.poles[r] |= poles;
    }
  }
}

// w (g - q sum g) + c (onehot - q1) - e q1 (log q1 + H), through softcap and scale.
template <class M, bool TEMPERED>
void gradient(float* __restrict s, const float* __restrict t, int64_t n, const Row row,
              const Tile& tile, int64_t r) {
  const bool smooth = !(tile.poles[r] & tile.smooth_mask);
  const float w = smooth ? tile.weight[r] * tile.inv_tau : 0.f;
  const float c = tile.coefficient ? tile.coefficient[r] : 0.f;
  const float e = tile.entropy_weight ? tile.entropy_weight[r] : 0.f;
  const float g_sum = M::taught && smooth ? tile.g_sum[r] : 0.f;  // no 0 * inf
  const float entropy = tile.entropy[r];
  const float scale = tile.scale;  // a local: the loop writes floats
  const float capped = tile.softcap > 0.f ? 1.f / (tile.softcap * scale) : 0.f;
  const int64_t local = tile.targets ? tile.targets[r] - tile.first_column : -1;
  const bool inside = local >= 0 && local < n;
  const float target = inside ? s[local] : 0.f;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float lq1, q1, lp1, p1, q, lq, p, lp, phi, g;
    const float u = capped > 0.f && s[i] > FLOOR ? s[i] * capped : 0.f;  // no -inf * 0
    terms_at<M, TEMPERED>(s[i], M::taught ? t[i] : 0.f, row, lq1, q1, lp1, p1, q, lq, p, lp, phi,
                          g);
    float v = -q1 * (c + e * (lq1 + entropy));
    if constexpr (M::taught) v += w * (g - q * g_sum);
    s[i] = v * scale * (1.f - u * u);
  }
  if (inside) {  // 1 - q by expm1: where the target is likely, little is left of 1 - q in fp32
    float lq1, q1, lp1, p1, q, lq, p, lp, phi, g;
    const float u = capped > 0.f && target > FLOOR ? target * capped : 0.f;
    terms_at<M, TEMPERED>(target, M::taught ? t[local] : 0.f, row, lq1, q1, lp1, p1, q, lq, p, lp,
                          phi, g);
    float v = -q1 * e * (lq1 + entropy);
    if constexpr (M::taught) v += w * (g - q * g_sum);
    v -= c * static_cast<float>(std::expm1(static_cast<double>(target) - tile.log_sum[r]));
    s[local] = v * scale * (1.f - u * u);
  }
}

template <class M, bool TEMPERED>
void walk(const Tile& tile, int64_t begin, int64_t end) {
  std::vector<Token> heap;
  for (int64_t r = begin; r < end; ++r) {
    float* s = tile.student + r * tile.student_stride;
    const float* t = tile.teacher ? tile.teacher + r * tile.teacher_stride : nullptr;
    const int64_t n = tile.columns;
    const bool whole = n == tile.vocabulary;  // nothing to add to
    bool done = false;
    if constexpr (M::chain != 0 && !TEMPERED) {
      done = whole && !tile.masked && tile.statistics && tile.sums &&
             (tile.teacher_statistics || !M::taught);
      if (done) one_walk<M>(s, t, n, tile, r);
    }
    if (tile.statistics && !done)
      statistics(s, n, tile.inv_tau, tile.log_sum[r], tile.tempered_log_sum[r]);
    if (tile.teacher_statistics && !(done && M::taught))
      statistics(t, n, tile.teacher_inv_tau, tile.teacher_log_sum[r],
                 tile.teacher_tempered_log_sum[r]);
    const int64_t local = tile.targets ? tile.targets[r] - tile.first_column : -1;
    if (local >= 0 && local < n) {
      if (tile.statistics) tile.target[r] = s[local];
      if (tile.teacher_statistics) tile.teacher_target[r] = t[local];
    }
    Row row{Sum(tile.log_sum[r]),
            Sum(tile.tempered_log_sum[r]),
            Sum(tile.teacher_log_sum[r]),
            Sum(tile.teacher_tempered_log_sum[r]),
            tile.inv_tau,
            tile.teacher_inv_tau,
            tile.a,
            tile.b};
    if constexpr (M::taught)
      if (tile.mix) tile.mixture[r] = forward_share<TEMPERED>(s, t, n, row, heap);
    if (tile.mixture) row.a = tile.mixture[r];
    if (tile.sums && !done) sums<M, TEMPERED>(s, t, n, row, tile, r);
    if (tile.gradient) gradient<M, TEMPERED>(s, t, n, row, tile, r);
  }
}

template <class M>
void choose(const Tile& tile, int64_t begin, int64_t end) {
  if (tile.inv_tau == 1.f && tile.teacher_inv_tau == 1.f)
    walk<M, false>(tile, begin, end);
  else
    walk<M, true>(tile, begin, end);
}

}  // namespace

extern "C" {

void dudi_rows(const Tile* tile, int64_t begin, int64_t end) {
  switch (tile->measure) {
#define CASE(number, type) \
  case number:             \
    return choose<type>(*tile, begin, end);
    DUDI_MEASURES(CASE)
#undef CASE
    default:
      return choose<None>(*tile, begin, end);
  }
}

const char* dudi_fingerprint() { return DUDI_FINGERPRINT; }

}  // extern "C"
