// The binding to XLA: turns a call frame into a Problem. Built against the oldest supported jaxlib's headers.
#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "huge_pages.h"
#include "isa.h"
#include "problem.h"
#include "processors.h"
#include "run.h"

namespace ffi = xla::ffi;

// Two steps: the list has to be expanded before XLA's macro sees how many members there are.
#define RAGGED_DECODE_STRUCT(...) XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(__VA_ARGS__)
#define RAGGED_MEMBER(type, name) , ::xla::ffi::StructMember<type>(#name)
RAGGED_DECODE_STRUCT(easydel_ragged::Attributes RAGGED_ATTRIBUTES(RAGGED_MEMBER));
#undef RAGGED_MEMBER
#undef RAGGED_DECODE_STRUCT

namespace easydel_ragged {
namespace {

bool to_dtype(ffi::DataType from, DType& to) {
  switch (from) {
    case ffi::F32:
      to = DType::kF32;
      return true;
    case ffi::BF16:
      to = DType::kBF16;
      return true;
    case ffi::F16:
      to = DType::kF16;
      return true;
    case ffi::F8E4M3FN:
      to = DType::kF8E4M3FN;
      return true;
    case ffi::F8E5M2:
      to = DType::kF8E5M2;
      return true;
    default:
      return false;
  }
}

ffi::Error bad(const std::string& what) {
  return ffi::Error::InvalidArgument("cpu_native: " + what + " (an error of easydel_ragged_plugin, not of the caller)");
}

bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return dims.size() == shape.size() && std::equal(dims.begin(), dims.end(), shape.begin());
}

// What all calls have: queries, index arrays, sinks, results. Sinks of shape [0] are not there.
struct Batch {
  ffi::AnyBuffer queries, context_lens, block_tables, query_start_loc, distribution, sinks, output;
  std::optional<ffi::AnyBuffer> lse;
};

// The results after the output: `arrays` of the cache, updated, and the logsumexp where it is wanted.
bool has_results(const ffi::RemainingRets& results, size_t arrays) {
  return results.size() == arrays || results.size() == arrays + 1;
}
std::optional<ffi::AnyBuffer> lse_of(const ffi::RemainingRets& results, size_t arrays) {
  if (results.size() == arrays) return std::nullopt;
  return **results.get<ffi::AnyBuffer>(arrays);
}

std::optional<std::string> read(const Batch& batch, Problem& p) {
  const auto q = batch.queries.dimensions(), o = batch.output.dimensions(), tables = batch.block_tables.dimensions();
  if (q.size() != 3 || o.size() != 3 || tables.size() != 2) return "wrong ranks";
  if (!to_dtype(batch.queries.element_type(), p.query_dtype) ||
      batch.output.element_type() != batch.queries.element_type())
    return "an unsupported dtype";
  p.num_tokens = q[0];
  p.num_q_heads = q[1];
  p.key_dim = q[2];
  p.head_dim = o[2];
  p.num_rows = tables[0];
  p.pages_per_row = tables[1];
  if (!has_shape(batch.output, {p.num_tokens, p.num_q_heads, p.head_dim})) return "an output of the wrong shape";
  for (const ffi::AnyBuffer& index :
       {batch.context_lens, batch.block_tables, batch.query_start_loc, batch.distribution})
    if (index.element_type() != ffi::S32) return "index arrays that are not int32";
  if (!has_shape(batch.context_lens, {p.num_rows}) || !has_shape(batch.query_start_loc, {p.num_rows + 1}) ||
      !has_shape(batch.distribution, {3}))
    return "metadata of the wrong shape";
  const bool has_sinks = !has_shape(batch.sinks, {0});
  if (batch.sinks.element_type() != ffi::F32 || (has_sinks && !has_shape(batch.sinks, {p.num_q_heads})))
    return "wrong sinks";
  if (batch.lse && (batch.lse->element_type() != ffi::F32 || !has_shape(*batch.lse, {p.num_tokens, p.num_q_heads})))
    return "a wrong lse";
  p.queries = batch.queries.untyped_data();
  p.output = batch.output.untyped_data();
  p.lse = batch.lse ? batch.lse->typed_data<float>() : nullptr;
  p.context_lens = batch.context_lens.typed_data<int32_t>();
  p.block_tables = batch.block_tables.typed_data<int32_t>();
  p.query_start_loc = batch.query_start_loc.typed_data<int32_t>();
  p.sinks = has_sinks ? batch.sinks.typed_data<float>() : nullptr;
  return std::nullopt;
}

// Runs a problem that has everything but its live rows.
ffi::Error run_call(Problem& p, const ffi::AnyBuffer& distribution, ffi::ThreadPool& pool) {
  if (const char* reason = check(p)) return bad(reason);
  if (p.num_tokens == 0) return ffi::Error::Success();
  p.live_rows = distribution.typed_data<int32_t>()[2];

  Executor executor;
  // The pool is as wide as the process' affinity was when JAX started.
  executor.threads = int(std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), usable_processors())));
  executor.spawn = [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
  try {
    run(p, executor);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "cpu_native: no memory for temporary arrays");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("cpu_native: ") + error.what());
  }
  return ffi::Error::Success();
}

// A call that writes has keys, values and, as a result, updated pages; others have none of them. Scales of shape [0]
// are not there.
ffi::Error attend(ffi::ThreadPool pool, Attributes attributes, ffi::AnyBuffer queries, ffi::AnyBuffer pages,
                  ffi::AnyBuffer context_lens, ffi::AnyBuffer block_tables, ffi::AnyBuffer query_start_loc,
                  ffi::AnyBuffer distribution, ffi::AnyBuffer sinks, ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
                  std::optional<ffi::AnyBuffer> keys, std::optional<ffi::AnyBuffer> values,
                  ffi::Result<ffi::AnyBuffer> output, ffi::RemainingRets results) {
  Problem p;
  static_cast<Attributes&>(p) = attributes;
  const size_t updated = keys.has_value() ? 1 : 0;
  if (keys.has_value() != values.has_value() || !has_results(results, updated))
    return bad("keys, values or updated pages without the others");
  const Batch batch{queries,      context_lens, block_tables, query_start_loc,
                    distribution, sinks,        *output,      lse_of(results, updated)};
  if (const auto reason = read(batch, p)) return bad(*reason);
  const auto cache = pages.dimensions();
  if (cache.size() < 3) return bad("wrong ranks");
  if (!to_dtype(pages.element_type(), p.cache_dtype)) return bad("an unsupported dtype");
  p.num_pages = cache[0];
  int64_t slot_size = 1;
  for (size_t i = 2; i < cache.size(); ++i) slot_size *= cache[i];
  if (cache[1] != p.page_size || slot_size != p.token_stride) return bad("strides that are not those of the pages");
  const bool has_k_scale = !has_shape(k_scale, {0}), has_v_scale = !has_shape(v_scale, {0});
  if (k_scale.element_type() != ffi::F32 || (has_k_scale && !has_shape(k_scale, {p.num_kv_heads})) ||
      v_scale.element_type() != ffi::F32 || (has_v_scale && !has_shape(v_scale, {p.num_kv_heads})))
    return bad("wrong scales");
  if (keys.has_value()) {
    if (!to_dtype(keys->element_type(), p.new_dtype) || values->element_type() != keys->element_type())
      return bad("keys or values of an unsupported dtype");
    for (const ffi::AnyBuffer& fresh : {*keys, *values})
      if (!has_shape(fresh, {p.num_tokens, p.num_kv_heads, p.head_dim}))
        return bad("keys or values of the wrong shape");
    // The pages are one buffer in and out: XLA copies them first where their old values are still needed.
    if ((*results.get<ffi::AnyBuffer>(0))->untyped_data() != pages.untyped_data())
      return bad("pages that are not aliased");
    p.keys = keys->untyped_data();
    p.values = values->untyped_data();
  }
  p.pages = pages.untyped_data();
  p.k_scales = has_k_scale ? k_scale.typed_data<float>() : nullptr;
  p.v_scales = has_v_scale ? v_scale.typed_data<float>() : nullptr;
  ffi::Error error = run_call(p, distribution, pool);
  if (error.success()) cache_seen(pages.untyped_data(), pages.size_bytes());
  return error;
}

// The same over a TurboQuant cache: its five arrays, for a call that writes those of the new tokens, too, and as many
// results, which are the cache updated.
ffi::Error attend_codes(ffi::ThreadPool pool, Attributes attributes, ffi::AnyBuffer queries,
                        ffi::AnyBuffer context_lens, ffi::AnyBuffer block_tables, ffi::AnyBuffer query_start_loc,
                        ffi::AnyBuffer distribution, ffi::AnyBuffer sinks, ffi::AnyBuffer query_rotation,
                        ffi::AnyBuffer output_rotation, ffi::AnyBuffer key_codebook, ffi::AnyBuffer value_codebook,
                        ffi::RemainingArgs arrays, ffi::Result<ffi::AnyBuffer> output, ffi::RemainingRets results) {
  constexpr size_t kArrays = Codes::kArrays;
  const bool writes = arrays.size() == 2 * kArrays;
  const size_t updated = writes ? kArrays : 0;
  Problem p;
  static_cast<Attributes&>(p) = attributes;
  if ((!writes && arrays.size() != kArrays) || !has_results(results, updated)) return bad("a wrong number of arrays");
  const Batch batch{queries,      context_lens, block_tables, query_start_loc,
                    distribution, sinks,        *output,      lse_of(results, updated)};
  if (const auto reason = read(batch, p)) return bad(*reason);
  if (p.key_dim != p.head_dim) return bad("an output of the wrong shape");
  if (query_rotation.dimensions().size() != 2) return bad("a wrong rotation");
  p.key_dim = query_rotation.dimensions()[0];
  if (query_rotation.element_type() != ffi::F32 || !has_shape(query_rotation, {p.key_dim, p.head_dim}) ||
      output_rotation.element_type() != ffi::F32 || !has_shape(output_rotation, {p.head_dim, p.head_dim}))
    return bad("a wrong rotation");
  p.codes.query_rotation = query_rotation.typed_data<float>();
  p.codes.output_rotation = output_rotation.typed_data<float>();
  for (const ffi::AnyBuffer& codebook : {key_codebook, value_codebook})
    if (codebook.element_type() != ffi::F32 || !has_shape(codebook, {16})) return bad("a wrong codebook");
  p.cache_dtype = DType::kCodes;
  p.codes.key_codebook = key_codebook.typed_data<float>();
  p.codes.value_codebook = value_codebook.typed_data<float>();
  for (size_t i = 0; i < kArrays; ++i) {
    const ffi::AnyBuffer array = *arrays.get<ffi::AnyBuffer>(i);
    const auto dims = array.dimensions();
    if (dims.size() < 3) return bad("wrong ranks");
    if (dims[1] != p.page_size) return bad("arrays of another page size");
    if (i > 0 && dims[0] != p.num_pages) return bad("arrays of different numbers of pages");
    p.num_pages = dims[0];
    p.codes.arrays[i] = static_cast<uint8_t*>(array.untyped_data());
    p.codes.bytes[i] = int64_t(ffi::ByteWidth(array.element_type()));
    for (size_t axis = 2; axis < dims.size(); ++axis) p.codes.bytes[i] *= dims[axis];
    const bool is_norm = i == Codes::kKeyNorms || i == Codes::kValueNorms;
    DType& norm = i == Codes::kKeyNorms ? p.codes.key_norms : p.codes.value_norms;
    if (is_norm ? !to_dtype(array.element_type(), norm) : array.element_type() != ffi::U8)
      return bad("codes of an unsupported dtype");
    if (!writes) continue;
    const ffi::AnyBuffer fresh = *arrays.get<ffi::AnyBuffer>(kArrays + i);
    if (fresh.element_type() != array.element_type() || int64_t(fresh.size_bytes()) != p.num_tokens * p.codes.bytes[i])
      return bad("new codes of the wrong shape");
    if ((*results.get<ffi::AnyBuffer>(i))->untyped_data() != array.untyped_data())
      return bad("codes that are not aliased");
    p.codes.fresh[i] = static_cast<const uint8_t*>(fresh.untyped_data());
  }
  p.keys = p.codes.fresh[Codes::kKeyIndices];
  p.values = p.codes.fresh[Codes::kValueIndices];
  return run_call(p, distribution, pool);
}

}  // namespace
}  // namespace easydel_ragged

#if defined(_WIN32)
#define RAGGED_EXPORT __declspec(dllexport)
#else
#define RAGGED_EXPORT __attribute__((visibility("default")))
#endif

#define RAGGED_TEXT(number) RAGGED_TEXT_OF(number)
#define RAGGED_TEXT_OF(number) #number
#if defined(__clang__)
#define RAGGED_COMPILER \
  "Clang " RAGGED_TEXT(__clang_major__) "." RAGGED_TEXT(__clang_minor__) "." RAGGED_TEXT(__clang_patchlevel__)
#elif defined(__GNUC__)
#define RAGGED_COMPILER "GCC " __VERSION__
#else
#define RAGGED_COMPILER "a compiler without a name"
#endif
#if defined(__GLIBC__)
#define RAGGED_LIBC ", glibc " RAGGED_TEXT(__GLIBC__) "." RAGGED_TEXT(__GLIBC_MINOR__)
#else
#define RAGGED_LIBC ""
#endif

extern "C" {

RAGGED_EXPORT XLA_FFI_Error* easydel_ragged_attention(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Attrs<easydel_ragged::Attributes>()
                             .Arg<ffi::AnyBuffer>()          // queries
                             .Arg<ffi::AnyBuffer>()          // pages
                             .Arg<ffi::AnyBuffer>()          // context_lens
                             .Arg<ffi::AnyBuffer>()          // block_tables
                             .Arg<ffi::AnyBuffer>()          // query_start_loc
                             .Arg<ffi::AnyBuffer>()          // distribution
                             .Arg<ffi::AnyBuffer>()          // sinks
                             .Arg<ffi::AnyBuffer>()          // k_scale
                             .Arg<ffi::AnyBuffer>()          // v_scale
                             .OptionalArg<ffi::AnyBuffer>()  // keys
                             .OptionalArg<ffi::AnyBuffer>()  // values
                             .Ret<ffi::AnyBuffer>()          // output
                             .RemainingRets()                // results
                             .To(easydel_ragged::attend)
                             .release();
  return handler->Call(frame);
}

RAGGED_EXPORT XLA_FFI_Error* easydel_ragged_attention_codes(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Attrs<easydel_ragged::Attributes>()
                             .Arg<ffi::AnyBuffer>()  // queries
                             .Arg<ffi::AnyBuffer>()  // context_lens
                             .Arg<ffi::AnyBuffer>()  // block_tables
                             .Arg<ffi::AnyBuffer>()  // query_start_loc
                             .Arg<ffi::AnyBuffer>()  // distribution
                             .Arg<ffi::AnyBuffer>()  // sinks
                             .Arg<ffi::AnyBuffer>()  // query_rotation
                             .Arg<ffi::AnyBuffer>()  // output_rotation
                             .Arg<ffi::AnyBuffer>()  // key_codebook
                             .Arg<ffi::AnyBuffer>()  // value_codebook
                             .RemainingArgs()        // arrays
                             .Ret<ffi::AnyBuffer>()  // output
                             .RemainingRets()        // results
                             .To(easydel_ragged::attend_codes)
                             .release();
  return handler->Call(frame);
}

// Runs in place of the handlers of other interface versions, whose buffers and attributes may mean other things.
RAGGED_EXPORT XLA_FFI_Error* easydel_ragged_other_interface(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs()
                             .To([](ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
                               return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                                                 "cpu_native: this program was saved with an older version of "
                                                 "easydel-ragged-plugin, whose calls this version does not have. "
                                                 "Save it again, or install the version that it was saved with.");
                             })
                             .release();
  return handler->Call(frame);
}

// The FFI version that this library was built for, as major * 1000 + minor.
RAGGED_EXPORT int easydel_ragged_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// Version of what this library and cpu_native.py agree on: functions, arguments, results, attributes.
RAGGED_EXPORT int easydel_ragged_interface() { return 6; }

// Threads that a call takes at most, however many XLA's pool has.
RAGGED_EXPORT int easydel_ragged_threads() { return easydel_ragged::usable_processors(); }

// Whether caches are moved to huge pages: not on a system that can't, nor where it was turned off.
RAGGED_EXPORT int easydel_ragged_huge_pages() { return easydel_ragged::huge_pages_used() ? 1 : 0; }
RAGGED_EXPORT void easydel_ragged_use_huge_pages(int use) { easydel_ragged::use_huge_pages(use != 0); }
// Moves all of a cache there now; by itself it is moved in steps while it serves.
RAGGED_EXPORT void easydel_ragged_move_to_huge_pages(void* cache, size_t bytes) {
  easydel_ragged::move_cache(cache, bytes);
}

RAGGED_EXPORT const char* easydel_ragged_isa() { return easydel_ragged::isa_name(); }
RAGGED_EXPORT const char* easydel_ragged_isa_levels() { return easydel_ragged::isa_levels(); }
RAGGED_EXPORT int easydel_ragged_set_isa(const char* name) { return easydel_ragged::set_isa(name) ? 1 : 0; }

// How this library was built, for reports: "compiler, C library for instruction sets".
RAGGED_EXPORT const char* easydel_ragged_build() {
  static const std::string text = std::string(RAGGED_COMPILER RAGGED_LIBC) + " for " + easydel_ragged::isa_built();
  return text.c_str();
}
}
