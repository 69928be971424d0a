// Maps between tokens and classes (classes.py): gathers by index, one row after the other. Included by
// rows.cpp. Mirrored field by field in maps.py.

extern "C" {

struct Group {  // classes of up to `width` members
  const int64_t *classes, *members;
  const float* log_weights;  // or null
  int64_t count, width;
};

struct Map {
  const float* from;     // (rows, tokens or classes)
  const float* classes;  // (rows, classes) class logits, of shares
  const float* shares;   // (rows, tokens that share)
  float* out;
  int64_t from_stride, classes_stride, shares_stride, out_stride, count;
  const int64_t *first, *second;  // tokens and their classes; classes and their places
  float inv_tau;
};

}  // extern "C"

namespace {

// log sum exp of some logits: fp32 in a segment, double over segments.
INLINE float class_logit(const float* x, const int64_t* members, const float* log_weights,
                         int64_t width, float inv_tau) {
  float scratch[SEGMENT];
  double total = 0.;
  float top = -INFINITY;
  for (int64_t start = 0; start < width; start += SEGMENT) {
    const int64_t n = std::min(SEGMENT, width - start);
    float own = -INFINITY;
    for (int64_t j = 0; j < n; ++j) {
      const float value = x[members[start + j]] * inv_tau;
      scratch[j] = log_weights ? value + log_weights[start + j] : value;
      own = scratch[j] > own ? scratch[j] : own;
    }
    const float higher = own > top ? own : top;
    const float base = higher == -INFINITY ? 0.f : higher;  // no inf - inf
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += exp_(scratch[j] - base);
    total = total * (top == -INFINITY ? 0. : std::exp(static_cast<double>(top - base))) + sum;
    top = higher;
  }
  if (total == 0.) return -INFINITY;
  return static_cast<float>(top + std::log(total));
}

}  // namespace

extern "C" {

void dudi_class_logits(const Map* map, const Group* groups, int64_t number, int64_t begin,
                       int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = map->from + r * map->from_stride;
    float* out = map->out + r * map->out_stride;
    for (const Group* g = groups; g < groups + number; ++g) {
      for (int64_t i = 0; i < g->count; ++i) {
        const int64_t at = i * g->width;
        const float* weights = g->log_weights ? g->log_weights + at : nullptr;
        out[g->classes[i]] =
            g->width == 1 ? x[g->members[i]] * map->inv_tau + (weights ? *weights : 0.f)
                          : class_logit(x, g->members + at, weights, g->width, map->inv_tau);
      }
    }
  }
}

// exp(inv_tau logits_v - class_logits_k): what a token has of its class.
void dudi_shares(const Map* map, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = map->from + r * map->from_stride;
    const float* classes = map->classes + r * map->classes_stride;
    float* out = map->out + r * map->out_stride;
#pragma omp simd
    for (int64_t i = 0; i < map->count; ++i) {
      const float whole = classes[map->second[i]];
      const float base = whole == -INFINITY ? 0.f : whole;  // masked whole: no inf - inf
      out[i] = exp_(x[map->first[i]] * map->inv_tau - base);
    }
  }
}

// The gradient of class logits in those of tokens. A place is where the token's share lies; or -1,
// where it is its class; or less, where it has none.
void dudi_pull(const Map* map, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* grad = map->from + r * map->from_stride;
    const float* shares = map->shares + r * map->shares_stride;
    float* out = map->out + r * map->out_stride;
    for (int64_t v = 0; v < map->count; ++v) {
      const int64_t place = map->second[v];
      const float share = place >= 0 ? shares[place] : 1.f;
      out[v] = place < -1 ? 0.f : grad[map->first[v]] * share * map->inv_tau;
    }
  }
}

}  // extern "C"
