#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "routines.h"

namespace easydel_ragged {
namespace {

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    default:
      return 1;
  }
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Memory that a thread keeps from call to call: fresh memory costs a page fault for every 4 KiB of it.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(64, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};
thread_local Scratch worker_scratch;
thread_local Scratch partial_scratch;

// A row that can be served.
struct Row {
  int64_t index;
  int64_t token;  // first query token
  int64_t count;  // query tokens
  int64_t position;  // of the first query token
};

int64_t first_position(const Problem& p, int64_t position) {
  return p.sliding_window > 0 ? std::max<int64_t>(position - p.sliding_window + 1, 0) : 0;
}

// The rows that can be served. A row is malformed when its queries run backwards or outside the batch, when its context
// is shorter than its queries or longer than its part of the block table, or when a page that it needs is not in the
// cache.
std::vector<Row> live_rows(const Problem& p) {
  std::vector<Row> rows;
  const int64_t total = std::min(p.live_rows, p.num_rows);
  for (int64_t r = 0; r < total; ++r) {
    const int64_t start = p.query_start_loc[r], end = p.query_start_loc[r + 1], context = p.context_lens[r];
    const int64_t count = end - start;
    if (start < 0 || count <= 0 || end > p.num_tokens) continue;
    if (context < count || context > p.pages_per_row * p.page_size) continue;
    const int32_t* table = p.block_tables + r * p.pages_per_row;
    const int64_t first = first_position(p, context - count) / p.page_size, last = (context - 1) / p.page_size;
    if (std::any_of(table + first, table + last + 1, [&](int32_t page) { return page < 0 || page >= p.num_pages; }))
      continue;
    rows.push_back({r, start, count, context - count});
  }
  return rows;
}

// Whether each row's tokens come after those of the row before it. Otherwise two rows may claim a token.
bool are_ordered(const std::vector<Row>& rows) {
  for (size_t r = 1; r < rows.size(); ++r)
    if (rows[r].token < rows[r - 1].token + rows[r - 1].count) return false;
  return true;
}

void clear_dead_tokens(const Problem& p, const std::vector<Row>& rows, bool ordered) {
  const size_t bytes = size_t(p.num_q_heads * p.head_dim) * element_size(p.query_dtype);
  char* output = static_cast<char*>(p.output);
  if (!ordered) {  // the rows overwrite their tokens later
    std::memset(output, 0, bytes * p.num_tokens);
    return;
  }
  int64_t token = 0;
  for (const Row& row : rows) {
    std::memset(output + token * bytes, 0, size_t(row.token - token) * bytes);
    token = row.token + row.count;
  }
  std::memset(output + token * bytes, 0, size_t(p.num_tokens - token) * bytes);
}

struct Item {
  enum Kind : int32_t { kWrite, kDecode, kPrefill } kind;
  int32_t row;       // in the list of live rows
  int64_t begin;     // decode: first key position; else: first query, counted in the row
  int64_t end;       // one past the last of these
  int64_t slot;      // decode: index of its partial; prefill: kv head
  double cost;       // estimated time, in ns of one thread
};

// Rough speed of one thread; only the ratios matter.
constexpr double kBytesPerNs = 10.0;
constexpr double kMultipliesPerNs = 40.0;
constexpr double kItemNs = 500.0;

// A chain of phases. Threads take the items of a phase from a counter, and pass on to the next phase once all items of
// this one are done. Nobody waits for a thread that has not started: a thread that comes late finds nothing left.
// Helpers hold the job alive; they touch what `work` refers to only between taking and finishing an item, and the
// caller returns only when all items are finished.
struct Job {
  struct Phase {
    int64_t size = 0;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  Phase phases[2];
  const std::function<void(int phase, int64_t item, char* scratch)>* work = nullptr;
  size_t scratch_bytes = 0;

  void run(char* scratch, bool caller) {
    for (int phase = 0; phase < 2; ++phase) {
      Phase& now = phases[phase];
      for (;;) {
        const int64_t item = now.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= now.size) break;
        (*work)(phase, item, scratch);
        now.done.fetch_add(1, std::memory_order_acq_rel);
      }
      if (phase == 1 && !caller) return;
      for (int spins = 0; now.done.load(std::memory_order_acquire) < now.size; ++spins) {
        if (spins < 4000)
          pause();
        else
          std::this_thread::yield();
      }
    }
  }

  void help() {
    bool left = false;
    for (Phase& phase : phases) left |= phase.next.load(std::memory_order_relaxed) < phase.size;
    if (!left) return;
    char* scratch;
    try {
      scratch = worker_scratch.reserve(scratch_bytes);
    } catch (const std::bad_alloc&) {
      return;  // the others do it
    }
    run(scratch, false);
  }
};

}  // namespace

const char* check(const Problem& p) {
  const auto positive = {p.num_q_heads, p.num_kv_heads, p.head_dim, p.page_size, p.token_stride, p.head_stride};
  for (int64_t value : positive)
    if (value <= 0 || value > (int64_t{1} << 31)) return "a size or stride is not positive, or too large";
  for (int64_t value : {p.num_tokens, p.num_rows, p.pages_per_row, p.num_pages})
    if (value < 0) return "a size is negative";
  if (p.num_q_heads % p.num_kv_heads != 0) return "query heads are not a multiple of kv heads";
  if (element_size(p.query_dtype) < 2) return "queries of an 8-bit type";
  if (p.padded_head_dim < p.head_dim || p.value_offset < p.padded_head_dim ||
      p.head_stride < p.value_offset + p.padded_head_dim || p.token_stride < p.num_kv_heads * p.head_stride)
    return "strides of the cache overlap";
  if (!(p.logits_soft_cap >= 0)) return "a negative soft cap";
  if (p.sliding_window < 0) return "a negative sliding window";
  if ((p.keys == nullptr) != (p.values == nullptr)) return "keys without values, or values without keys";
  return nullptr;
}

void run(const Problem& p, const Executor& executor) {
  if (p.num_tokens == 0) return;
  const Routines& isa = routines();
  const std::vector<Row> rows = live_rows(p);
  const bool ordered = are_ordered(rows);
  clear_dead_tokens(p, rows, ordered);
  if (rows.empty()) return;

  // A token that two rows claim is written for both. Its output is the last one's, so nobody may run beside another.
  const int threads = ordered ? std::max(1, executor.threads) : 1;
  const double token_bytes = double(2 * p.num_kv_heads * p.head_dim) * element_size(p.cache_dtype);

  // Phase 0: writes. A few are not worth a phase of their own.
  std::vector<Item> writes;
  if (p.keys != nullptr) {
    int64_t tokens = 0;
    for (const Row& row : rows) tokens += row.count;
    const bool together = tokens * token_bytes > 256 * 1024 && threads > 1;
    for (size_t r = 0; r < rows.size(); ++r) {
      const Row& row = rows[r];
      if (!together) {
        isa.write(p, row.index, row.position, row.token, row.count);
        continue;
      }
      for (int64_t begin = 0; begin < row.count; begin += 64)
        writes.push_back({Item::kWrite, int32_t(r), begin, std::min(row.count, begin + 64), 0, 0.0});
    }
  }

  // Phase 1: attention. Long decode rows are cut so that there are about eight items for each thread; the cuts depend
  // on the request and on the number of threads alone, so results do not depend on who takes what.
  double decode_tokens = 0, prefill_cost = 0;
  bool any_decode = false, any_prefill = false;
  for (const Row& row : rows) {
    if (row.count == 1) {
      any_decode = true;
      decode_tokens += double(row.position + 1 - first_position(p, row.position));
    } else {
      any_prefill = true;
    }
  }
  std::vector<Item> items;
  std::vector<int64_t> first_partial(rows.size(), 0), num_partials(rows.size(), 0);
  int64_t partials = 0;
  const int64_t chunk = isa.prefill_chunk(p);
  for (size_t r = 0; r < rows.size(); ++r) {
    const Row& row = rows[r];
    if (row.count == 1) continue;
    for (int64_t begin = 0; begin < row.count; begin += chunk) {
      const int64_t end = std::min(row.count, begin + chunk);
      const double keys = double(row.position + (begin + end) / 2 - first_position(p, row.position + begin) + 1);
      const double cost =
          kItemNs + keys * double(p.head_dim) * (2.0 * double((end - begin) * p.group()) + 16.0) / kMultipliesPerNs;
      for (int64_t head = 0; head < p.num_kv_heads; ++head)
        items.push_back({Item::kPrefill, int32_t(r), begin, end, head, cost});
      prefill_cost += cost * double(p.num_kv_heads);
    }
  }
  if (any_decode) {
    const double all = decode_tokens + prefill_cost * kBytesPerNs / token_bytes;
    const int64_t least = std::max<int64_t>(64, int64_t(65536 / token_bytes));
    const int64_t most = threads == 1 ? INT64_MAX : std::max(least, int64_t(all / (8.0 * threads)) + 1);
    for (size_t r = 0; r < rows.size(); ++r) {
      const Row& row = rows[r];
      if (row.count != 1) continue;
      const int64_t begin = first_position(p, row.position), length = row.position + 1 - begin;
      const int64_t parts = (length - 1) / most + 1, step = (length + parts - 1) / parts;
      first_partial[r] = partials;
      for (int64_t at = 0; at < length; at += step) {
        const int64_t size = std::min(step, length - at);
        items.push_back({Item::kDecode, int32_t(r), begin + at, begin + at + size, partials++,
                         kItemNs + double(size) * token_bytes / kBytesPerNs});
      }
      num_partials[r] = partials - first_partial[r];
    }
  }
  std::stable_sort(items.begin(), items.end(), [ordered](const Item& a, const Item& b) {
    return ordered ? a.cost > b.cost : a.row < b.row;
  });

  const int64_t stride = partial_stride(p);
  const int64_t partial_floats = p.num_q_heads * (stride + 2);
  float* partial_memory = nullptr;
  std::vector<Partial> partial;
  std::vector<std::atomic<int32_t>> unfinished(partials > 0 ? rows.size() : 0);
  if (partials > 0) {
    const size_t floats = size_t(partial_floats + 15) / 16 * 16;
    partial_memory = reinterpret_cast<float*>(partial_scratch.reserve(floats * size_t(partials) * sizeof(float)));
    partial.resize(partials);
    for (int64_t i = 0; i < partials; ++i) {
      float* base = partial_memory + floats * size_t(i);
      partial[i] = {base + p.num_q_heads * stride, base + p.num_q_heads * (stride + 1), base};
    }
    for (size_t r = 0; r < rows.size(); ++r) unfinished[r].store(int32_t(num_partials[r]), std::memory_order_relaxed);
  }

  const std::function<void(int, int64_t, char*)> work = [&](int phase, int64_t index, char* scratch) {
    const Item& item = phase == 0 ? writes[index] : items[index];
    const Row& row = rows[item.row];
    switch (item.kind) {
      case Item::kWrite:
        isa.write(p, row.index, row.position + item.begin, row.token + item.begin, item.end - item.begin);
        break;
      case Item::kPrefill:
        isa.prefill(p, row.index, item.slot, row.position + item.begin, row.token + item.begin, item.end - item.begin,
                    scratch);
        break;
      case Item::kDecode:
        isa.decode(p, row.index, row.token, item.begin, item.end, partial[item.slot], scratch);
        if (unfinished[item.row].fetch_sub(1, std::memory_order_acq_rel) == 1)  // the last one merges, in fixed order
          isa.finish(p, &partial[first_partial[item.row]], num_partials[item.row], row.token);
        break;
    }
  };

  auto job = std::make_shared<Job>();
  job->scratch_bytes = std::max(any_decode ? isa.decode_scratch(p) : 0, any_prefill ? isa.prefill_scratch(p) : 0);
  char* scratch = worker_scratch.reserve(job->scratch_bytes);
  job->work = &work;
  job->phases[0].size = int64_t(writes.size());
  job->phases[1].size = int64_t(items.size());

  // Waking a thread takes some microseconds: below about twice that, alone is faster.
  double cost = 0;
  for (const Item& item : items) cost += item.cost;
  const int64_t widest = std::max(job->phases[0].size, job->phases[1].size);
  const int64_t helpers = cost < 30000.0 || !executor.spawn ? 0 : std::min<int64_t>(threads, widest) - 1;
  for (int64_t i = 0; i < helpers; ++i) executor.spawn([job] { job->help(); });
  job->run(scratch, true);
}

}  // namespace easydel_ragged
