#include "coarse_scan.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace r2ec {

namespace {

Finish from(const Finish& finish, int64_t row) {
  return {finish.scale ? finish.scale + row : nullptr, finish.half ? finish.half + row : nullptr};
}

void offer_score(const Offers& offers, int64_t query, float product, Finish finish, int64_t i,
                 float error, int64_t row) {
  const float p = product * (finish.scale ? finish.scale[i] : 1.0f);
  const float score = p - (finish.half ? finish.half[i] : 0.0f);
  const float slack = error + offers.relative * std::fabs(p);
  offers.selection.offer(offers.worker, query, score - slack, score + slack, row);
}

// Offers those of a group's products with one query that meet its threshold. `row` is that of the
// first; `finish` is the group's, rows outside `allowed` are left out.
void offer_group(const Offers& offers, int64_t query, const float* products, int64_t count,
                 Finish finish, float error, int64_t row, uint32_t allowed = ~0u) {
  const float need = offers.selection.threshold(query) - error;
  uint32_t met = allowed & offers.tiles.reach(products, count, finish, need, offers.relative);
  for (; met; met &= met - 1) {
    const int i = __builtin_ctz(met);
    offer_score(offers, query, products[i], finish, i, error, row + i);
  }
}

// Bits of the rows whose codes can be trusted.
uint32_t trusted_rows(const CodeTable& table, int64_t row, int64_t count) {
  if (!table.trusted) return ~0u;
  uint32_t allowed = 0;
  for (int64_t i = 0; i < count; ++i) allowed |= static_cast<uint32_t>(table.trusted[row + i]) << i;
  return allowed;
}

}  // namespace

void scan_codes(const CodeTable& table, const CodeQueries& queries, int64_t first, int64_t last,
                const Offers& offers) {
  const int64_t num_queries = offers.selection.queries();
  std::vector<int32_t> sums(num_queries * kGroup);
  float products[kGroup];
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    const uint32_t allowed = trusted_rows(table, row, count);
    offers.tiles.multiply_codes({table.codes + row * table.columns, table.columns, count},
                                queries.operand, sums.data());
    for (int64_t q = 0; q < num_queries; ++q) {
      for (int64_t i = 0; i < count; ++i)
        products[i] = static_cast<float>(sums[q * kGroup + i]) * queries.step[q];
      offer_group(offers, q, products, count, from(table.finish, row), offers.error[q], row,
                  allowed);
    }
  }
}

namespace {

// Products of up to kGroup float32 rows with all queries, and how far they can be trusted.
class FloatGroup {
 public:
  FloatGroup(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
             double huge, const Tiles& tiles)
      : table_(table),
        queries_(queries),
        similarity_(similarity),
        huge_(huge),
        tiles_(tiles),
        unit_(unit_of(similarity, queries.operand.terms)),
        lost_(std::sqrt(static_cast<double>(table.columns)) * 0x1p-62),
        products_(queries.operand.num_queries * kGroup) {}

  // Rows whose norm is not trusted are appended to `doubtful`.
  void multiply(int64_t row, int64_t count, std::vector<int64_t>& doubtful) {
    float squares[kGroup];
    tiles_.multiply_floats({table_.rows + row * table_.stride, table_.stride, count},
                           queries_.operand, products_.data(), squares);
    allowed_ = 0;
    largest_ = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const double norm = std::sqrt(static_cast<double>(squares[i]));
      scale_[i] = norm > 0.0 ? static_cast<float>(1.0 / norm) : 0.0f;
      half_[i] = 0.5f * squares[i];
      if (is_trusted(row + i, norm)) {
        largest_ = std::max(largest_, norm);
        allowed_ |= 1u << i;
      } else {
        doubtful.push_back(row + i);
      }
    }
    largest_ = largest_ * 1.001 + lost_;
  }

  float* products(int64_t query) { return products_.data() + query * kGroup; }
  Finish finish() const {
    return {similarity_ == Similarity::kCosine ? scale_ : nullptr,
            similarity_ == Similarity::kL2 ? half_ : nullptr};
  }
  uint32_t allowed() const { return allowed_; }  // bits of trusted rows

  // Bound of the raw scores' errors. Matrix units flush parts and sums below the normal range as
  // well as products: twice the floor.
  double error(int64_t query) const {
    const double norm = queries_.norm[query];
    const double size = similarity_ == Similarity::kCosine ? norm
                        : similarity_ == Similarity::kL2   ? (norm + largest_) * (norm + largest_)
                                                           : norm * largest_;
    return (unit_ * size + 2.0 * queries_.floor[query]) * (1 + 0x1p-20);
  }

 private:
  // Canonical rounding, the norm and its reciprocal (cosine) or its square (l2) included.
  static double unit_of(Similarity similarity, double terms) {
    constexpr double kSafety = 1.01;  // second-order terms and float32 norms
    const double all = similarity == Similarity::kCosine ? 1.5 * terms + 12.0 : terms + 10.0;
    return kSafety * all * 0x1p-24;
  }

  bool is_trusted(int64_t row, double norm) const {
    if (similarity_ == Similarity::kCosine && norm < 1.0 / huge_) {
      const float* const values = table_.rows + row * table_.stride;
      return std::all_of(values, values + table_.columns, [](float x) { return x == 0.0f; });
    }
    return norm <= huge_;  // false for NaN
  }

  const FloatTable& table_;
  const FloatQueries& queries_;
  const Similarity similarity_;
  const double huge_;
  const Tiles& tiles_;
  const double unit_;
  const double lost_;            // squares below float32's normal range may be lost from a norm
  std::vector<float> products_;  // [queries, kGroup]
  float scale_[kGroup], half_[kGroup];
  uint32_t allowed_ = 0;
  double largest_ = 0.0;
};

// The same of rows as two codes.
class FineGroup {
 public:
  FineGroup(const FineTable& table, const CodeQueries& queries, const float* error,
            const Tiles& tiles)
      : table_(table),
        queries_(queries),
        error_(error),
        tiles_(tiles),
        high_(queries.operand.num_queries * kGroup),
        low_(high_.size()),
        products_(high_.size()) {}

  void multiply(int64_t row, int64_t count, std::vector<int64_t>& doubtful) {
    const CodeTable& table = table_.high;
    const int64_t at = row * table.columns;
    tiles_.multiply_codes({table.codes + at, table.columns, count}, queries_.operand, high_.data());
    tiles_.multiply_codes({table_.low + at, table.columns, count}, queries_.operand, low_.data());
    for (int64_t q = 0; q < queries_.operand.num_queries; ++q) {
      const float step = queries_.step[q] / kLowParts;
      const int32_t *const high = high_.data() + q * kGroup, *const low = low_.data() + q * kGroup;
      float* const out = products(q);
      for (int64_t i = 0; i < kGroup; ++i)
        out[i] = (static_cast<float>(high[i]) * kLowParts + static_cast<float>(low[i])) * step;
    }
    scale_ = table.finish.scale ? table.finish.scale + row : nullptr;
    allowed_ = trusted_rows(table, row, count);
    for (int64_t i = 0; i < count; ++i)
      if (!(allowed_ >> i & 1)) doubtful.push_back(row + i);
    if (count < kGroup) {  // what lies behind the last row is not read
      allowed_ &= (1u << count) - 1;
      for (int64_t i = 0; scale_ && i < count; ++i) last_scale_[i] = scale_[i];
      if (scale_) scale_ = last_scale_;
    }
  }

  float* products(int64_t query) { return products_.data() + query * kGroup; }
  Finish finish() const { return {scale_, nullptr}; }
  uint32_t allowed() const { return allowed_; }
  double error(int64_t query) const { return error_[query]; }

 private:
  const FineTable& table_;
  const CodeQueries& queries_;
  const float* const error_;
  const Tiles& tiles_;
  std::vector<int32_t> high_, low_;  // [queries, kGroup]
  std::vector<float> products_;
  const float* scale_ = nullptr;
  float last_scale_[kGroup] = {};
  uint32_t allowed_ = 0;
};

// Adds rows first..last-1, multiplied by `group`.
template <typename Group>
bool add_groups(Group& group, const Contest& contest, const Tiles& tiles, int64_t first,
                int64_t last, Stats& stats) {
  const auto& targets = contest.targets;
  const auto num_queries = static_cast<int64_t>(targets.size());
  const int64_t* const end = contest.left_out.pairs + contest.left_out.count;
  const int64_t* pair = std::lower_bound(contest.left_out.pairs, end, first * num_queries);
  std::vector<uint32_t> out(num_queries);  // bits of the group's rows that do not compete
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    group.multiply(row, count, stats.doubtful);
    const int64_t* const own = pair;
    for (; pair != end && *pair < (row + count) * num_queries; ++pair)
      out[*pair % num_queries] |= 1u << (*pair / num_queries - row);
    for (int64_t q = 0; q < num_queries; ++q) {
      // both canonical roundings and that of the two limits
      const double error = group.error(q) + std::fabs(targets[q].raw) * 0x1p-22;
      auto& fold = stats.folds[q];
      fold.high = static_cast<float>(targets[q].raw + error);
      fold.low = static_cast<float>(targets[q].raw - error);
      uint32_t near = 0;
      stats.ahead[q] += tiles.fold(group.products(q), group.finish().scale,
                                   group.allowed() & ~out[q], fold, near);
      for (; near; near &= near - 1)
        stats.near.push_back((row + __builtin_ctz(near)) * num_queries + q);
    }
    for (const int64_t* used = own; used != pair; ++used) out[*used % num_queries] = 0;
    if (static_cast<int64_t>(stats.near.size()) > contest.most_near) return false;
  }
  return true;
}

}  // namespace

void scan_floats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                 double huge, int64_t first, int64_t last, const Offers& offers,
                 std::vector<int64_t>& doubtful) {
  FloatGroup group(table, queries, similarity, huge, offers.tiles);
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    group.multiply(row, count, doubtful);
    for (int64_t q = 0; q < offers.selection.queries(); ++q)
      offer_group(offers, q, group.products(q), count, group.finish(),
                  static_cast<float>(group.error(q)), row, group.allowed());
  }
}

bool add_stats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
               double huge, const Contest& contest, const Tiles& tiles, int64_t first, int64_t last,
               Stats& stats) {
  FloatGroup group(table, queries, similarity, huge, tiles);
  return add_groups(group, contest, tiles, first, last, stats);
}

bool add_code_stats(const FineTable& table, const CodeQueries& queries, const float* error,
                    const Contest& contest, const Tiles& tiles, int64_t first, int64_t last,
                    Stats& stats) {
  FineGroup group(table, queries, error, tiles);
  return add_groups(group, contest, tiles, first, last, stats);
}

template <typename T>
void scan_products(const T* products, int64_t stride, Finish finish, int64_t start, int64_t first,
                   int64_t last, const Offers& offers) {
  const auto reach = [&] {
    if constexpr (std::is_same_v<T, float>)
      return offers.tiles.reach_f32;
    else
      return offers.tiles.reach_bf16;
  }();
  const int64_t num_queries = offers.selection.queries();
  std::vector<float> need(num_queries);
  for (int64_t row = first; row < last; ++row) {
    if ((row - first) % kGroup == 0)
      for (int64_t q = 0; q < num_queries; ++q)
        need[q] = offers.selection.threshold(q) - offers.error[q];
    const T* const values = products + row * stride;
    const Finish own = from(finish, row);
    const float scale = own.scale ? *own.scale : 1.0f, half = own.half ? *own.half : 0.0f;
    for (int64_t begin = 0; begin < num_queries; begin += kGroup) {
      uint32_t met = reach(values + begin, std::min(kGroup, num_queries - begin), scale, half,
                           need.data() + begin, offers.relative);
      for (; met; met &= met - 1) {
        const int64_t q = begin + __builtin_ctz(met);
        offer_score(offers, q, to_float(values[q]), own, 0, offers.error[q], start + row);
      }
    }
  }
}

template void scan_products<float>(const float*, int64_t, Finish, int64_t, int64_t, int64_t,
                                   const Offers&);
template void scan_products<Bfloat16>(const Bfloat16*, int64_t, Finish, int64_t, int64_t, int64_t,
                                      const Offers&);

void scan_product_columns(const float* products, int64_t stride, Finish finish, int64_t start,
                          int64_t first, int64_t last, const Offers& offers) {
  constexpr int64_t kStretch = 1024;  // rows of a query that are read in one go
  for (int64_t begin = first; begin < last; begin += kStretch) {
    const int64_t end = std::min(last, begin + kStretch);
    for (int64_t q = 0; q < offers.selection.queries(); ++q)
      for (int64_t row = begin; row < end; row += kGroup)
        offer_group(offers, q, products + q * stride + row, std::min(kGroup, end - row),
                    from(finish, row), offers.error[q], start + row);
  }
}

}  // namespace r2ec
