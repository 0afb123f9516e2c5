// The inner loops of the search, once as templates, then compiled for each width of vector units.

#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The width is chosen when the library is loaded. Without contraction all give the same bits. Not for
// sanitizers: they would instrument the chooser, which runs before they are set up.
#if defined(__x86_64__) && defined(__linux__) && !defined(DIFFNL_SANITIZE)
#define DIFFNL_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DIFFNL_VECTOR_CLONES
#endif
#define DIFFNL_INLINE [[gnu::always_inline]] inline

namespace diffnl {

namespace {

template <typename T>
DIFFNL_INLINE Vec3<T> vector_to(const Tile<T>& t, int c, Vec3<T> ri) {
  return pair_vector<T>(ri, {t.x[c], t.y[c], t.z[c]}, {t.tx[c], t.ty[c], t.tz[c]});
}

template <typename T>
DIFFNL_INLINE void translate_loop(Tile<T>& t, const T* h) {
  for (int c = 0; c < t.size; ++c) {
    const T s0 = t.s0[c] + t.w0, s1 = t.s1[c] + t.w1, s2 = t.s2[c] + t.w2;
    t.tx[c] = cell_translation(s0, s1, s2, h, 0);
    t.ty[c] = cell_translation(s0, s1, s2, h, 1);
    t.tz[c] = cell_translation(s0, s1, s2, h, 2);
  }
}

// From components to candidates, four at a time; what lies behind the last one does not matter.
template <typename T>
DIFFNL_INLINE void pack_loop(const T* x, const T* y, const T* z, int size, T* packed) {
  using V = typename Lanes<T>::type;
  using N = typename Lanes<T>::number;
  const V zero{0, 0, 0, 0};
  for (int c = 0; c < size; c += 4) {
    const V vx = lanes_at(x + c), vy = lanes_at(y + c), vz = lanes_at(z + c);
    const V xy01 = __builtin_shuffle(vx, vy, N{0, 4, 1, 5}), xy23 = __builtin_shuffle(vx, vy, N{2, 6, 3, 7});
    const V z01 = __builtin_shuffle(vz, zero, N{0, 4, 1, 5}), z23 = __builtin_shuffle(vz, zero, N{2, 6, 3, 7});
    lanes_at(packed + 4 * c) = __builtin_shuffle(xy01, z01, N{0, 1, 4, 5});
    lanes_at(packed + 4 * c + 4) = __builtin_shuffle(xy01, z01, N{2, 3, 6, 7});
    lanes_at(packed + 4 * c + 8) = __builtin_shuffle(xy23, z23, N{0, 1, 4, 5});
    lanes_at(packed + 4 * c + 12) = __builtin_shuffle(xy23, z23, N{2, 3, 6, 7});
  }
}

template <typename T>
DIFFNL_INLINE void pack_candidates_loop(Tile<T>& t) {
  pack_loop(t.x.data(), t.y.data(), t.z.data(), t.size, t.r.data());
  pack_loop(t.s0.data(), t.s1.data(), t.s2.data(), t.size, t.s.data());
}

template <typename T>
DIFFNL_INLINE void pack_translations_loop(Tile<T>& t) {
  pack_loop(t.tx.data(), t.ty.data(), t.tz.data(), t.size, t.t.data());
}

template <typename T>
DIFFNL_INLINE int count_loop(const Tile<T>& t, Vec3<T> ri, T cutoff2) {
  int count = 0;
  for (int c = 0; c < t.size; ++c) count += squared_length(vector_to(t, c, ri)) < cutoff2 ? 1 : 0;
  return count;
}

template <typename T>
DIFFNL_INLINE std::array<int, 2> count_loop(const Tile<T>& t, Vec3<T> ri, std::array<T, 2> cutoff2) {
  const T first = cutoff2[0], second = cutoff2[1];
  int in_first = 0, in_second = 0;
  for (int c = 0; c < t.size; ++c) {
    const T d2 = squared_length(vector_to(t, c, ri));
    in_first += d2 < first ? 1 : 0;
    in_second += d2 < second ? 1 : 0;
  }
  return {in_first, in_second};
}

template <typename T>
DIFFNL_INLINE void measure_loop(Tile<T>& t, Vec3<T> ri) {
  for (int c = 0; c < t.size; ++c) t.d2[c] = squared_length(vector_to(t, c, ri));
}

template <typename T>
DIFFNL_INLINE void write_loop(const Tile<T>& t, Vec3<T> ri, const int32_t* __restrict chosen, int count,
                              int64_t* __restrict mapping_j, int32_t* __restrict shifts, T* __restrict vectors) {
  using V = typename Lanes<T>::type;
  using W = typename Lanes<int32_t>::type;
  if (count == 0) return;
  const T* __restrict r = t.r.data(), * __restrict s = t.s.data(), * __restrict translations = t.t.data();
  const V w{t.w0, t.w1, t.w2, 0}, from{ri.x, ri.y, ri.z, 0};
  for (int n = 0; n < count; ++n) mapping_j[n] = t.j[chosen[n]];
  // The spare component lands where the next pair follows; the last pair has none to spare.
  const int last = count - 1, c = chosen[last];
  for (int n = 0; n < last; ++n)
    lanes_at(shifts + 3 * n) = __builtin_convertvector(lanes_at(s + 4 * chosen[n]) + w, W);
  for (int n = 0; n < last; ++n)
    lanes_at(vectors + 3 * n) = (lanes_at(r + 4 * chosen[n]) - from) + lanes_at(translations + 4 * chosen[n]);
  const W S = __builtin_convertvector(lanes_at(s + 4 * c) + w, W);
  const V v = (lanes_at(r + 4 * c) - from) + lanes_at(translations + 4 * c);
  for (int k = 0; k < 3; ++k) {
    shifts[3 * last + k] = S[k];
    vectors[3 * last + k] = v[k];
  }
}

// Twice a positive part is d + |d|: a comparison here would keep some compilers from vectorizing.
template <typename T>
DIFFNL_INLINE void gap_loop(const T* __restrict x, const T* __restrict y, const T* __restrict z, int size,
                            Vec3<T> image, const Box<T>& box, T* __restrict gaps4) {
  const T x0 = image.x - box.centre[0], y0 = image.y - box.centre[1], z0 = image.z - box.centre[2];
  for (int n = 0; n < size; ++n) {
    const T dx = std::abs(x[n] + x0) - box.half[0];
    const T dy = std::abs(y[n] + y0) - box.half[1];
    const T dz = std::abs(z[n] + z0) - box.half[2];
    gaps4[n] = squared_length<T>({dx + std::abs(dx), dy + std::abs(dy), dz + std::abs(dz)});
  }
}

// Four candidates at once: each is read as a whole, and the four are turned into components. Gathering component
// by component takes three times as many loads.
template <typename T>
DIFFNL_INLINE void measure_candidates_loop(const RowSource<T>& source, const CandidateRow<T>& row, T* d2) {
  using V = typename Lanes<T>::type;
  using N = typename Lanes<T>::number;
  const T *positions = source.positions, *translations = source.translations;
  const int32_t *j = row.j, *image = row.image;
  const V ri{row.ri.x, row.ri.y, row.ri.z, 0};
  const auto vector_to = [&](int c) {
    return (lanes_at(positions + 4 * int64_t(j[c])) - ri) + lanes_at(translations + 4 * int64_t(image[c]));
  };
  int c = 0;
  for (; c + 4 <= row.size; c += 4) {
    const V v0 = vector_to(c), v1 = vector_to(c + 1), v2 = vector_to(c + 2), v3 = vector_to(c + 3);
    const V xy01 = __builtin_shuffle(v0, v1, N{0, 4, 1, 5}), xy23 = __builtin_shuffle(v2, v3, N{0, 4, 1, 5});
    const V z01 = __builtin_shuffle(v0, v1, N{2, 6, 3, 7}), z23 = __builtin_shuffle(v2, v3, N{2, 6, 3, 7});
    const V x = __builtin_shuffle(xy01, xy23, N{0, 1, 4, 5}), y = __builtin_shuffle(xy01, xy23, N{2, 3, 6, 7});
    const V z = __builtin_shuffle(z01, z23, N{0, 1, 4, 5});
    lanes_at(d2 + c) = (x * x + y * y) + z * z;
  }
  for (; c < row.size; ++c) {
    const V v = vector_to(c);
    d2[c] = squared_length<T>({v[0], v[1], v[2]});
  }
}

// Selection: a branch for each entry would be mispredicted too often, so entries are compared several at a time
// and the numbers of those that pass are moved together in a register.
template <typename T>
inline int select_plain(const T* values, int n, int size, T limit, int32_t* chosen, int count) {
  for (; n < size; ++n) {
    chosen[count] = n;
    count += values[n] < limit ? 1 : 0;
  }
  return count;
}

#if defined(__x86_64__)
// SSE2, which is always there: four comparisons pick one of sixteen ready-made lists of positions.
inline int mask_below(const float* values, float limit) {
  return _mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(values), _mm_set1_ps(limit)));
}
inline int mask_below(const double* values, double limit) {
  const int low = _mm_movemask_pd(_mm_cmplt_pd(_mm_loadu_pd(values), _mm_set1_pd(limit)));
  const int high = _mm_movemask_pd(_mm_cmplt_pd(_mm_loadu_pd(values + 2), _mm_set1_pd(limit)));
  return low | high << 2;
}

struct SetBits {
  alignas(16) int32_t position[16][4];
  int32_t count[16];
};
constexpr SetBits make_set_bits() {
  SetBits bits{};
  for (int mask = 0; mask < 16; ++mask)
    for (int bit = 0; bit < 4; ++bit)
      if (mask >> bit & 1) bits.position[mask][bits.count[mask]++] = bit;
  return bits;
}
constexpr SetBits kSetBits = make_set_bits();

template <typename T>
int select_sse2(const T* values, int size, T limit, int32_t* chosen) {
  int count = 0;
  const int whole = size & ~3;
  for (int n = 0; n < whole; n += 4) {
    const int mask = mask_below(values + n, limit);
    const __m128i position = _mm_load_si128(reinterpret_cast<const __m128i*>(kSetBits.position[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(chosen + count), _mm_add_epi32(position, _mm_set1_epi32(n)));
    count += kSetBits.count[mask];
  }
  return select_plain(values, whole, size, limit, chosen, count);
}

inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f");
  return has;
}

// AVX-512 compresses the numbers themselves.
#define DIFFNL_AVX512 __attribute__((target("avx512f")))
DIFFNL_AVX512 inline unsigned mask16_below(const float* values, float limit) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(limit), _CMP_LT_OQ);
}
DIFFNL_AVX512 inline unsigned mask16_below(const double* values, double limit) {
  const __m512d limits = _mm512_set1_pd(limit);
  const unsigned low = _mm512_cmp_pd_mask(_mm512_loadu_pd(values), limits, _CMP_LT_OQ);
  const unsigned high = _mm512_cmp_pd_mask(_mm512_loadu_pd(values + 8), limits, _CMP_LT_OQ);
  return low | high << 8;
}

template <typename T>
DIFFNL_AVX512 int select_avx512(const T* values, int size, T limit, int32_t* chosen) {
  int count = 0;
  const int whole = size & ~15;
  __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int n = 0; n < whole; n += 16) {
    const unsigned mask = mask16_below(values + n, limit);
    _mm512_storeu_si512(chosen + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), number));
    number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
    count += __builtin_popcount(mask);
  }
  return select_plain(values, whole, size, limit, chosen, count);
}

// Marks are the same bits kept in between.
template <typename T>
DIFFNL_AVX512 int mark_avx512(const T* values, int whole, T limit, uint16_t* marks) {
  int count = 0;
  for (int n = 0; n < whole; n += 16) {
    const unsigned mask = mask16_below(values + n, limit);
    marks[n / 16] = static_cast<uint16_t>(mask);
    count += __builtin_popcount(mask);
  }
  return count;
}

template <typename T>
int mark_sse2(const T* values, int whole, T limit, uint16_t* marks) {
  int count = 0;
  for (int n = 0; n < whole; n += 16) {
    unsigned mask = 0;
    for (int k = 0; k < 16; k += 4) mask |= static_cast<unsigned>(mask_below(values + n + k, limit)) << k;
    marks[n / 16] = static_cast<uint16_t>(mask);
    for (int k = 0; k < 16; k += 4) count += kSetBits.count[mask >> k & 15];
  }
  return count;
}

template <typename T>
int mark_whole(const T* values, int whole, T limit, uint16_t* marks) {
  return has_avx512() ? mark_avx512(values, whole, limit, marks) : mark_sse2(values, whole, limit, marks);
}

DIFFNL_AVX512 inline void select_marked_avx512(const uint16_t* marks, int size, int32_t* chosen) {
  __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int n = 0; n < size; n += 16) {
    _mm512_storeu_si512(chosen, _mm512_maskz_compress_epi32(static_cast<__mmask16>(marks[n / 16]), number));
    number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
    chosen += __builtin_popcount(marks[n / 16]);
  }
}

inline void select_marked_sse2(const uint16_t* marks, int size, int32_t* chosen) {
  for (int n = 0; n < size; n += 4) {
    const int mask = marks[n / 16] >> n % 16 & 15;
    const __m128i position = _mm_load_si128(reinterpret_cast<const __m128i*>(kSetBits.position[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(chosen), _mm_add_epi32(position, _mm_set1_epi32(n)));
    chosen += kSetBits.count[mask];
  }
}

inline void select_marked_loop(const uint16_t* marks, int size, int32_t* chosen) {
  has_avx512() ? select_marked_avx512(marks, size, chosen) : select_marked_sse2(marks, size, chosen);
}

template <typename T>
int select_loop(const T* values, int size, T limit, int32_t* chosen) {
  return has_avx512() ? select_avx512(values, size, limit, chosen) : select_sse2(values, size, limit, chosen);
}
#else
template <typename T>
int select_loop(const T* values, int size, T limit, int32_t* chosen) {
  return select_plain(values, 0, size, limit, chosen, 0);
}
template <typename T>
int mark_whole(const T* values, int whole, T limit, uint16_t* marks) {
  int count = 0;
  for (int n = 0; n < whole; n += 16) {
    unsigned mask = 0;
    for (int k = 0; k < 16; ++k) mask |= (values[n + k] < limit ? 1u : 0u) << k;
    marks[n / 16] = static_cast<uint16_t>(mask);
    count += __builtin_popcount(mask);
  }
  return count;
}
inline void select_marked_loop(const uint16_t* marks, int size, int32_t* chosen) {
  for (int n = 0; n < size; n += 16)
    for (unsigned left = marks[n / 16]; left != 0; left &= left - 1) *chosen++ = n + __builtin_ctz(left);
}
#endif

template <typename T>
int mark_loop(const T* values, int size, T limit, uint16_t* marks) {
  const int whole = size & ~15;
  const int count = mark_whole(values, whole, limit, marks);
  if (whole == size) return count;
  unsigned mask = 0;
  for (int n = whole; n < size; ++n) mask |= (values[n] < limit ? 1u : 0u) << (n - whole);
  marks[whole / 16] = static_cast<uint16_t>(mask);
  return count + __builtin_popcount(mask);
}

}  // namespace

// target_clones takes no templates: one function a type.
DIFFNL_VECTOR_CLONES void translate(Tile<float>& tile, const float* h) { translate_loop(tile, h); }
DIFFNL_VECTOR_CLONES void translate(Tile<double>& tile, const double* h) { translate_loop(tile, h); }

DIFFNL_VECTOR_CLONES void pack_candidates(Tile<float>& tile) { pack_candidates_loop(tile); }
DIFFNL_VECTOR_CLONES void pack_candidates(Tile<double>& tile) { pack_candidates_loop(tile); }
DIFFNL_VECTOR_CLONES void pack_translations(Tile<float>& tile) { pack_translations_loop(tile); }
DIFFNL_VECTOR_CLONES void pack_translations(Tile<double>& tile) { pack_translations_loop(tile); }

DIFFNL_VECTOR_CLONES int count_within(const Tile<float>& tile, Vec3<float> ri, float cutoff2) {
  return count_loop(tile, ri, cutoff2);
}
DIFFNL_VECTOR_CLONES int count_within(const Tile<double>& tile, Vec3<double> ri, double cutoff2) {
  return count_loop(tile, ri, cutoff2);
}

DIFFNL_VECTOR_CLONES std::array<int, 2> count_within(const Tile<float>& tile, Vec3<float> ri,
                                                     std::array<float, 2> cutoff2) {
  return count_loop(tile, ri, cutoff2);
}
DIFFNL_VECTOR_CLONES std::array<int, 2> count_within(const Tile<double>& tile, Vec3<double> ri,
                                                     std::array<double, 2> cutoff2) {
  return count_loop(tile, ri, cutoff2);
}

DIFFNL_VECTOR_CLONES void measure(Tile<float>& tile, Vec3<float> ri) { measure_loop(tile, ri); }
DIFFNL_VECTOR_CLONES void measure(Tile<double>& tile, Vec3<double> ri) { measure_loop(tile, ri); }

DIFFNL_VECTOR_CLONES void write_row(const Tile<float>& tile, Vec3<float> ri, const int32_t* chosen, int count,
                                    int64_t* mapping_j, int32_t* shifts, float* vectors) {
  write_loop(tile, ri, chosen, count, mapping_j, shifts, vectors);
}
DIFFNL_VECTOR_CLONES void write_row(const Tile<double>& tile, Vec3<double> ri, const int32_t* chosen, int count,
                                    int64_t* mapping_j, int32_t* shifts, double* vectors) {
  write_loop(tile, ri, chosen, count, mapping_j, shifts, vectors);
}

DIFFNL_VECTOR_CLONES void measure_candidates(const RowSource<float>& source, const CandidateRow<float>& row,
                                             float* d2) {
  measure_candidates_loop(source, row, d2);
}
DIFFNL_VECTOR_CLONES void measure_candidates(const RowSource<double>& source, const CandidateRow<double>& row,
                                             double* d2) {
  measure_candidates_loop(source, row, d2);
}

DIFFNL_VECTOR_CLONES void measure_gaps4(const float* x, const float* y, const float* z, int size,
                                        Vec3<float> image, const Box<float>& box, float* gaps4) {
  gap_loop(x, y, z, size, image, box, gaps4);
}
DIFFNL_VECTOR_CLONES void measure_gaps4(const double* x, const double* y, const double* z, int size,
                                        Vec3<double> image, const Box<double>& box, double* gaps4) {
  gap_loop(x, y, z, size, image, box, gaps4);
}

DIFFNL_VECTOR_CLONES void rank_numbers(const int64_t* numbers, int size, int32_t* ranks) {
  for (int n = 0; n < size; ++n) {
    const int64_t own = numbers[n];
    int64_t smaller = 0;
    for (int m = 0; m < size; ++m) smaller += numbers[m] < own ? 1 : 0;
    ranks[n] = static_cast<int32_t>(smaller);
  }
}

int select_below(const float* values, int size, float limit, int32_t* chosen) {
  return select_loop(values, size, limit, chosen);
}
int select_below(const double* values, int size, double limit, int32_t* chosen) {
  return select_loop(values, size, limit, chosen);
}

int mark_below(const float* values, int size, float limit, uint16_t* marks) {
  return mark_loop(values, size, limit, marks);
}
int mark_below(const double* values, int size, double limit, uint16_t* marks) {
  return mark_loop(values, size, limit, marks);
}

void select_marked(const uint16_t* marks, int size, int32_t* chosen) { select_marked_loop(marks, size, chosen); }

}  // namespace diffnl
