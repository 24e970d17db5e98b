#include "plan.h"

#include <algorithm>
#include <cstdint>

#include "visible.h"

namespace easydel_ragged {
namespace {

// Rough speed of one thread; only the ratios matter.
constexpr double kBytesPerNs = 10.0;
constexpr double kMultipliesPerNs = 40.0;
constexpr double kItemNs = 500.0;

// A thread starts some microseconds after it was woken: below about twice that, alone is faster.
constexpr double kLeastSharedNs = 30000.0;
// Waking one keeps the caller busy for so long.
constexpr double kWakeNs = 2000.0;

constexpr int64_t kLeastSharedWrites = 256 * 1024;  // bytes
constexpr int64_t kWriteTokens = 64;                // of a shared write

constexpr int64_t kLeastFewTokens = 128;  // of a part of a context, and the same in bytes
constexpr double kLeastFewBytes = 65536;
constexpr int64_t kLeastManyTokens = 512;
constexpr double kItemsPerThread = 8.0;
constexpr double kWaitedFor = 1.15;  // of the time without waiting

// Keys and values of one token, as bytes that take as long to read. Codes take longer: they are unpacked.
double read_bytes(const Problem& p) {
  if (p.cache_dtype != DType::kCodes) return double(slot_bytes(p));
  return double(2 * p.num_kv_heads * (p.key_dim + p.head_dim));
}

int64_t new_tokens(const Rows& rows) {
  int64_t tokens = 0;
  for (const Row& row : rows.live) tokens += row.count;
  return tokens;
}

// Those of all rows, in parts of at most `most` tokens.
std::vector<Write> writes_of(const Rows& rows, int64_t most) {
  std::vector<Write> writes;
  writes.reserve(rows.live.size());
  for (size_t r = 0; r < rows.live.size(); ++r)
    for (int64_t begin = 0, count = rows.live[r].count; begin < count; begin += most)
      writes.push_back({int32_t(r), begin, std::min(count, begin + most)});
  return writes;
}

void add_writes(const Problem& p, const Rows& rows, int threads, Plan& plan) {
  plan.shared_writes = new_tokens(rows) * slot_bytes(p) > kLeastSharedWrites && threads > 1;
  plan.writes = writes_of(rows, plan.shared_writes ? kWriteTokens : p.num_tokens);
}

// Threads that a call of this cost is worth sharing between. The caller wakes them one after the other, so with n of
// them it takes about cost / n + n * kWakeNs, which is least where n * n is cost / kWakeNs. (sqrt would need libm.)
int useful_threads(double cost, int threads) {
  int useful = 1;
  if (cost < kLeastSharedNs) return useful;
  while (useful < threads && double(useful + 1) * double(useful + 1) * kWakeNs <= cost) ++useful;
  return useful;
}

// Some queries and the keys that they read together: an item, or one for each kv head, before it is cut in parts.
struct Piece {
  Item::Kind kind;
  int32_t row;
  int32_t queries, count;  // in Plan::queries
  int64_t begin, end;
  bool merged;  // whether other pieces have keys of the same queries
};

class Planner {
 public:
  Planner(const Problem& problem, const Rows& rows, const Limits& limits, Plan& plan)
      : p_(problem), rows_(rows), limits_(limits), plan_(plan), bytes_(read_bytes(problem)) {}

  void add_pieces(const std::vector<SharedKeys>& shared) {
    first_answer_.assign(rows_.live.size(), -1);
    pieces_.reserve(rows_.live.size());
    plan_.queries.reserve(rows_.live.size());
    plan_.answers.reserve(rows_.live.size());
    std::vector<int64_t> own(shared.empty() ? 0 : rows_.live.size(), 0);  // where a row's own keys begin
    for (const SharedKeys& keys : shared) {
      for (int32_t r : keys.rows) own[r] = std::max(own[r], keys.end);
      add_shared(keys);
    }
    for (size_t r = 0; r < rows_.live.size(); ++r) add_row(int32_t(r), own.empty() ? 0 : own[r]);
  }

  double cost() const {
    double all = 0;
    for (const Piece& piece : pieces_) all += cost(piece, piece.begin, piece.end) * double(heads(piece));
    return all;
  }

  void add_items(double cost_of_call, int threads) {
    plan_.items.reserve(pieces_.size());
    for (const Piece& piece : pieces_) {
      const int64_t parts = parts_of(piece, cost_of_call, threads), length = piece.end - piece.begin;
      const int64_t step = (length + parts - 1) / parts;
      for (int64_t begin = piece.begin; begin < piece.end; begin += step)
        add_item(piece, begin, std::min(piece.end, begin + step), begin > piece.begin);
    }
    for (Answer& answer : plan_.answers) {
      answer.first = plan_.num_partials;
      plan_.num_partials += answer.count;
    }
    for (ItemQuery& query : plan_.queries)
      if (query.answer >= 0) query.partial += plan_.answers[query.answer].first;
  }

 private:
  bool few(int64_t queries) const { return queries <= limits_.most_few; }
  int64_t heads(const Piece& piece) const { return piece.kind == Item::kMany ? p_.num_kv_heads : 1; }

  void add_queries(int32_t r, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      plan_.queries.push_back({rows_.live[r].token + i, rows_.live[r].position + i, -1, -1});
  }
  // The queries of a row whose outputs are merged have answers, one after the other.
  int32_t answer_of(int32_t r, int64_t token) {
    if (first_answer_[r] < 0) {
      first_answer_[r] = int32_t(plan_.answers.size());
      for (int64_t i = 0; i < rows_.live[r].count; ++i) plan_.answers.push_back({rows_.live[r].token + i, 0, 0, 0});
    }
    return first_answer_[r] + int32_t(token - rows_.live[r].token);
  }

  void add_shared(const SharedKeys& keys) {
    int64_t all = 0;
    for (int32_t r : keys.rows) all += rows_.live[r].count;
    const Item::Kind kind = few(all) ? Item::kFew : Item::kMany;
    const int64_t most = kind == Item::kFew ? limits_.most_few : limits_.most_many;
    Piece piece{kind, keys.rows[0], int32_t(plan_.queries.size()), 0, keys.begin, keys.end, true};
    for (int32_t r : keys.rows)
      for (int64_t i = 0; i < rows_.live[r].count; ++i) {
        if (piece.count == most) {
          pieces_.push_back(piece);
          piece.queries += piece.count;
          piece.count = 0;
        }
        add_queries(r, i, i + 1);
        plan_.queries.back().answer = answer_of(r, plan_.queries.back().token);
        ++piece.count;
      }
    pieces_.push_back(piece);
  }

  void add_row(int32_t r, int64_t own) {
    const Row& row = rows_.live[r];
    const Item::Kind kind = few(row.count) ? Item::kFew : Item::kMany;
    const int64_t most = kind == Item::kFew ? limits_.most_few : limits_.most_many;
    for (int64_t begin = 0; begin < row.count; begin += most) {
      const int64_t end = std::min(row.count, begin + most);
      const KeyRange keys = visible_keys(p_, row.position + begin, end - begin);
      const Piece piece{kind,
                        r,
                        int32_t(plan_.queries.size()),
                        int32_t(end - begin),
                        std::max(keys.begin, own),
                        keys.end,
                        kind == Item::kFew || own > 0};
      add_queries(r, begin, end);
      if (piece.merged)
        for (int64_t i = begin; i < end; ++i)
          plan_.queries[piece.queries + i - begin].answer = answer_of(r, row.token + i);
      pieces_.push_back(piece);
    }
  }

  double cost(const Piece& piece, int64_t begin, int64_t end) const {
    if (piece.kind == Item::kFew) {
      const double multiplies = double(p_.num_q_heads * (p_.key_dim + p_.head_dim) * (piece.count - 1));
      return kItemNs + double(end - begin) * (bytes_ / kBytesPerNs + multiplies / kMultipliesPerNs);
    }
    // Of keys that not all queries see, about a half is multiplied.
    const int64_t masked = std::min(end - begin, int64_t(piece.count)) / 2;
    return kItemNs + double(end - begin - masked) * double(p_.key_dim + p_.head_dim) *
                         (double(piece.count * p_.group()) + 8.0) / kMultipliesPerNs;
  }

  // Long contexts of few queries are cut so that there are about eight items for each thread; those of many, where some
  // threads would wait for others in the last round.
  int64_t parts_of(const Piece& piece, double cost_of_call, int threads) const {
    if (threads == 1) return 1;
    const int64_t length = piece.end - piece.begin;
    const double all = cost(piece, piece.begin, piece.end);
    if (piece.kind == Item::kMany) {
      const double rounds = cost_of_call / (all * threads);
      if (double(int64_t(rounds + 0.99)) < kWaitedFor * rounds) return 1;
      return std::max<int64_t>(1, std::min(length / kLeastManyTokens, int64_t(4.0 / rounds)));
    }
    const int64_t least = std::max(kLeastFewTokens, int64_t(kLeastFewBytes / bytes_));
    const double most = cost_of_call / (kItemsPerThread * threads);
    return (length - 1) / std::max(least, int64_t(double(length) * most / all) + 1) + 1;
  }

  // A later part of a piece has queries of its own, whose parts go to other partials.
  void add_item(const Piece& piece, int64_t begin, int64_t end, bool later) {
    const bool merged = piece.merged || end - begin < piece.end - piece.begin;
    int32_t queries = piece.queries;
    if (later) {
      queries = int32_t(plan_.queries.size());
      for (int32_t i = 0; i < piece.count; ++i) plan_.queries.push_back(ItemQuery(plan_.queries[piece.queries + i]));
    }
    for (int32_t i = 0; merged && i < piece.count; ++i) {
      ItemQuery& query = plan_.queries[queries + i];
      if (query.answer < 0) query.answer = answer_of(piece.row, query.token);
      Answer& answer = plan_.answers[query.answer];
      query.partial = answer.count++;
      answer.items += int32_t(heads(piece));
    }
    const double estimate = cost(piece, begin, end);
    for (int64_t head = 0; head < heads(piece); ++head)
      plan_.items.push_back({piece.kind, piece.row, piece.kind == Item::kMany ? int32_t(head) : -1, queries,
                             piece.count, begin, end, estimate});
  }

  const Problem& p_;
  const Rows& rows_;
  const Limits& limits_;
  Plan& plan_;
  const double bytes_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> first_answer_;  // of each row, -1: none
};

}  // namespace

std::vector<Write> make_writes(const Rows& rows) { return writes_of(rows, kWriteTokens); }

Plan make_plan(const Problem& p, const Rows& rows, const std::vector<SharedKeys>& shared, const Limits& limits,
               int threads) {
  // Nobody may run beside a row whose output is to be overwritten by a later row's.
  threads = rows.ordered ? std::max(1, threads) : 1;
  Plan plan;
  Planner planner(p, rows, limits, plan);
  planner.add_pieces(shared);
  const double attention = planner.cost();
  const double writes = p.keys != nullptr ? double(new_tokens(rows) * slot_bytes(p)) / kBytesPerNs : 0.0;
  threads = useful_threads(attention + writes, threads);
  if (p.keys != nullptr) add_writes(p, rows, threads, plan);
  planner.add_items(attention, threads);
  // The longest first: what is left for the end is short. Rows that overlap keep their order.
  const auto before = [&rows](const Item& a, const Item& b) { return rows.ordered ? a.cost > b.cost : a.row < b.row; };
  if (!std::is_sorted(plan.items.begin(), plan.items.end(), before))
    std::stable_sort(plan.items.begin(), plan.items.end(), before);
  const size_t widest = std::max(plan.shared_writes ? plan.writes.size() : 0, plan.items.size());
  plan.helpers = int32_t(std::min<size_t>(size_t(threads), std::max<size_t>(widest, 1))) - 1;
  return plan;
}

}  // namespace easydel_ragged
