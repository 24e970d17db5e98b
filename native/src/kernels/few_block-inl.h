// Blocks of keys that few queries attend: the tokens of a row that come into the second-level cache together. Their
// addresses, what is requested from memory ahead of them, and the scratch memory.

constexpr int kMostBlock = 128;               // most tokens of one block
constexpr int64_t kMostBlockBytes = 1 << 17;  // and most bytes of it: with the next, they fit a second-level cache
constexpr int64_t kStagedStride = 2048;       // bytes between tokens that are far apart
// Fewest tokens of a block, and how many it has where they are large and one row of queries reads them. Tiles multiply
// 32 at a time.
#if defined(__AMX_BF16__)
constexpr int kLeastBlock = 32, kSmallBlock = 32;
#else
constexpr int kLeastBlock = 16, kSmallBlock = 8;
#endif
constexpr int kBlockPadding = 32;  // addresses after a block's, of tokens that may be read as well
constexpr int kMostQueries = 8;    // rows of queries whose weights are held at a time
constexpr int64_t kMostFew = 8;    // queries of a call; packing pays from about so many on

// The number does not depend on the heads, which may be split between devices, so that the order of sums does not.
int64_t most_few(const Problem&) { return kMostFew; }

constexpr int kLineElements = kCacheLine / 4;  // of 32 bits: a float, or a pair of bfloat16
// Of rows in lanes: keys, or columns of values, at a time. Their sums fill the registers beside a vector of lanes.
constexpr int kLaneTokens = 16;

// Whether rows of queries are taken in lanes (few_lanes-inl.h): where a product spreads an element that it loads.
#if defined(__AVX512F__)
constexpr bool kInLanes = true;
#else
constexpr bool kInLanes = false;
#endif
// How many of some rows are. A few lanes may be empty.
RAGGED_INLINE int64_t rows_in_lanes(int64_t rows) {
  if (!kInLanes) return 0;
  const int64_t rest = rows % kLanes;
  return rest * 4 >= kLanes * 3 ? rows : rows - rest;
}

// Tokens [low, high) of a block, which a query sees; none where high is not above low.
struct Seen {
  int64_t low, high;
};
RAGGED_INLINE Seen seen_of_block(const Problem& p, int64_t position, int64_t begin, int64_t count) {
  const KeyRange keys = visible_keys(p, position, 1);
  return {max64(0, keys.begin - begin), min64(count, keys.end - begin)};
}

// The next block, which is requested from memory while one is worked on: a line at a time, since a burst would fill the
// line buffers and stall the arithmetic, and in the order of addresses. By heads, neighboring requests would lie in
// different pages of memory.
struct Ahead {
  const char* const* slot = nullptr;
  const int32_t* lines = nullptr;  // of a token: the offsets of those that hold elements
  int64_t lines_each = 0;
  int64_t left = 0;    // lines that were in no budget yet
  int64_t next = 0;    // of the lines of *slot
  int64_t budget = 0;  // lines that may be requested now

  RAGGED_INLINE_MEMBER void request() {
    if (budget == 0) return;
    --budget;
    prefetch(*slot + lines[next]);
    if (++next == lines_each) {
      next = 0;
      ++slot;
    }
  }
};

// What few queries need.
struct FewScratch {
  char* queries;             // [kv_heads][rows][query_stride], elements of the products, zeros past key_dim
  float* weights;            // of the rows that are worked on, [rows][kMostBlock]
  float* pairs;              // the same in bfloat16
  Seen* seen;                // [queries]
  const char** slot;         // addresses of the block's tokens, and after them of tokens that may be read as well
  const char** next;         // of the next block's
  const char** staged_slot;  // of the block's tokens in `staged`
  int32_t* lines;            // Ahead::lines
  char* staged;              // keys and values of a kv head, converted: [tokens][2][query_stride]
  Norms norms;               // of the block's tokens, where the cache is of codes
  const char** requests;     // then: lines of the next block
  char* rest;                // what a way to attend needs for itself
  int64_t query_stride;
  size_t size;

  RAGGED_INLINE int64_t most_lines(const Problem& p) {
    return p.token_stride * int64_t(element_size(p.cache_dtype)) / kCacheLine + 1;
  }
  FewScratch(const Problem& p, int64_t count, void* base) {
    Carver carver{static_cast<char*>(base)};
    query_stride = round_up(p.key_dim, 64);  // whole vectors of any elements
    queries = carver.take<char>(count * p.num_q_heads * query_stride * int64_t(sizeof(float)));
    weights = carver.take<float>(kMostQueries * kMostBlock);
    pairs = carver.take<float>(kMostQueries * kMostBlock / 2);
    seen = carver.take<Seen>(count);
    slot = carver.take<const char*>(kMostBlock + kBlockPadding);
    next = carver.take<const char*>(kMostBlock + kBlockPadding);
    staged_slot = carver.take<const char*>(kMostBlock + kBlockPadding);
    lines = carver.take<int32_t>(most_lines(p));
    staged = carver.take<char>(most_tokens(p) * 2 * query_stride * int64_t(sizeof(float)));
    const int64_t coded = p.cache_dtype == DType::kCodes ? kMostBlock + kLanes : 0;
    norms = {carver.take<float>(coded), carver.take<float>(coded)};
    requests = carver.take<const char*>(coded * (slot_bytes(p) / kCacheLine + 2 * Codes::kArrays));
    rest = carver.take<char>(0);
    size = carver.used;
  }
  // Tokens of a block. It is the same for all ways to attend, so that the order of sums is.
  RAGGED_INLINE int64_t most_tokens(const Problem& p) {
    return max64(kLeastBlock, min64(kMostBlock, kMostBlockBytes / slot_bytes(p) / kLeastBlock * kLeastBlock));
  }
  // Of so many rows of a kv head.
  RAGGED_INLINE int64_t block_tokens(const Problem& p, int64_t rows) {
    const int64_t most = most_tokens(p);
    return rows == 1 && most == kLeastBlock && most * slot_bytes(p) > kMostBlockBytes ? kSmallBlock : most;
  }
  template <class T>
  RAGGED_INLINE_MEMBER T* queries_of(int64_t row) const {
    return reinterpret_cast<T*>(queries) + row * query_stride;
  }
};

// The lines of a token that hold elements of some kv heads, as offsets in bytes.
template <class T>
int64_t find_lines(const Problem& p, HeadRange kv_heads, int32_t* lines) {
  int64_t count = 0, next = 0;
  for (int64_t part = 2 * kv_heads.begin; part < 2 * kv_heads.end; ++part) {
    const int64_t begin = (part / 2 * p.head_stride + part % 2 * p.value_offset) * int64_t(sizeof(T));
    const int64_t last = (begin + p.head_dim * int64_t(sizeof(T)) - 1) / kCacheLine;
    for (next = max64(next, begin / kCacheLine); next <= last; ++next) lines[count++] = int32_t(next * kCacheLine);
  }
  return count;
}

// The lines of a block that is to come.
template <class T>
Ahead lines_ahead(const Problem& p, const FewScratch& s, const char* const* slot, int64_t count, int64_t lines_each) {
  if constexpr (!is_same<T, Coded>) return {slot, s.lines, lines_each, count * lines_each};
  // Codes are in several arrays: of these the lines are listed one by one.
  int64_t found = 0;
  for (int array = 0; array < Codes::kArrays; ++array) {
    const int64_t bytes = p.codes.bytes[array];
    uintptr_t last = 0;
    for (int64_t t = 0; t < count; ++t) {
      const uintptr_t first =
          uintptr_t(p.codes.arrays[array]) + reinterpret_cast<uintptr_t>(slot[t]) * uintptr_t(bytes);
      for (uintptr_t line = first / kCacheLine; line <= (first + uintptr_t(bytes) - 1) / kCacheLine; ++line)
        if (line != last) s.requests[found++] = reinterpret_cast<const char*>((last = line) * kCacheLine);
    }
  }
  s.lines[0] = 0;
  return {s.requests, s.lines, 1, found};
}
