// Whole calls: how many threads they wake, and what is left where memory runs out.
#include "run.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "problems.h"
#include "scratch.h"
#include "unit.h"

namespace {

// Allocations of all threads that may still succeed.
constexpr int kUnlimited = 1 << 30;
std::atomic<int> allowed{kUnlimited};

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allowed.load() < kUnlimited && allowed.fetch_sub(1) <= 0) throw std::bad_alloc();
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

#if !defined(__clang__)  // GCC sees the free of an operator that it has made inline, and not that new is replaced, too
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif

void* operator new(std::size_t bytes) { return allocate(bytes == 0 ? 1 : bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return allocate(bytes, std::size_t(alignment)); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return ::operator new(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace easydel_ragged {
namespace {

// Decode rows of `context` tokens each, float32, 8 heads of 64: 4 KiB for a token.
struct Decoding {
  Problem p;
  std::vector<float> queries, pages, output;
  std::vector<int32_t> context_lens, block_tables, query_start_loc;

  Decoding(int64_t rows, int64_t context) {
    p.num_kv_heads = p.num_q_heads = 8;
    p.head_dim = p.key_dim = p.padded_head_dim = p.value_offset = 64;
    p.head_stride = 128;
    p.token_stride = 8 * 128;
    p.page_size = 16;
    p.softmax_scale = 0.125f;
    p.v_scale = 1.0f;
    p.num_rows = p.num_tokens = p.live_rows = rows;
    p.pages_per_row = (context + 15) / 16;
    p.num_pages = rows * p.pages_per_row;
    queries.assign(size_t(rows * 8 * 64), 0.0f);
    output.assign(queries.size(), -1.0f);
    pages.resize(size_t(p.num_pages * p.page_size * p.token_stride));
    for (int64_t page = 0; page < p.num_pages; ++page) {
      const float value = float(page / p.pages_per_row);  // that of the row
      std::fill_n(pages.begin() + page * p.page_size * p.token_stride, p.page_size * p.token_stride, value);
      block_tables.push_back(int32_t(page));
    }
    context_lens.assign(size_t(rows), int32_t(context));
    for (int32_t r = 0; r <= rows; ++r) query_start_loc.push_back(r);
    p.queries = queries.data();
    p.pages = pages.data();
    p.output = output.data();
    p.context_lens = context_lens.data();
    p.block_tables = block_tables.data();
    p.query_start_loc = query_start_loc.data();
    CHECK(check(p) == nullptr);
  }

  // Tasks that are spawned where there are so many threads. None of them runs, and the results are right all the same.
  int spawned(int threads) {
    int count = 0;
    run(p, {threads, [&](std::function<void()>) { ++count; }});
    for (size_t i = 0; i < output.size(); ++i) CHECK(std::fabs(output[i] - float(i / (8 * 64))) < 1e-3f);
    return count;
  }
};

TEST(a_call_wakes_as_many_threads_as_its_work_pays_for) {
  Decoding tiny(1, 10), small(40, 20), large(64, 400);
  for (int threads : {1, 2, 64}) CHECK(tiny.spawned(threads) == 0);
  CHECK(small.spawned(1) == 0);
  CHECK(small.spawned(2) == 1);
  CHECK(small.spawned(4) == 3);
  CHECK(small.spawned(64) >= 4 && small.spawned(64) <= 20);
  CHECK(large.spawned(64) == 63);
}

TEST(small_calls_give_back_what_a_large_one_took) {
  std::thread([] {
    Decoding tiny(1, 10), large(64, 2000);
    tiny.spawned(1);
    const size_t before = Scratch::kept_bytes();
    large.spawned(64);  // cut into partials for 64 threads
    CHECK(Scratch::kept_bytes() > before + (size_t{1} << 20));
    for (int i = 0; i < 2 * Scratch::kPeriod; ++i) tiny.spawned(1);
    CHECK(Scratch::kept_bytes() <= before);
  }).join();
}

Problem random_problem(uint32_t seed, Arrays& arrays) {
  std::vector<uint8_t> stream(600);
  uint32_t state = seed * 2654435761u + 12345u;
  for (uint8_t& byte : stream) {
    state = state * 1664525u + 1013904223u;
    byte = uint8_t(state >> 24);
  }
  Bytes bytes(stream.data(), stream.size());
  return make_problem(bytes, arrays, true);
}

TEST(where_memory_runs_out_the_call_fails_and_its_helpers_find_nothing) {
  int spawned = 0, failed = 0, served = 0;
  for (uint32_t seed = 0; seed < 80; seed += 2) {
    Arrays wanted;
    run(random_problem(seed, wanted), {4, nullptr});
    bool enough = false;
    for (int allocations = 0; !enough; ++allocations) {
      // In a thread of its own, which has no memory from earlier calls.
      std::thread([&] {
        auto arrays = std::make_unique<Arrays>();
        const Problem p = random_problem(seed, *arrays);
        std::vector<std::function<void()>> late;
        std::vector<std::thread> threads;
        late.reserve(8);
        threads.reserve(8);
        const Executor executor{4, [&](std::function<void()> task) {
                                  if (spawned++ % 2 == 0)
                                    threads.emplace_back(std::move(task));
                                  else
                                    late.push_back(std::move(task));
                                }};
        bool done = true;
        allowed = allocations;
        try {
          run(p, executor);
        } catch (const std::bad_alloc&) {
          done = false;
        }
        enough = allowed.load() > 0;
        allowed = kUnlimited;
        if (done) CHECK(arrays->output == wanted.output && arrays->pages == wanted.pages);
        CHECK(done || !enough);
        ++(done ? served : failed);
        arrays.reset();  // what the call pointed to is gone when the late ones start
        for (auto& task : late) task();
        for (std::thread& thread : threads) thread.join();
      }).join();
    }
  }
  CHECK(spawned > 0 && failed > 0 && served > 0);
}

}  // namespace
}  // namespace easydel_ragged
