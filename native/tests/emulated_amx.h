// Intel's tile instructions in plain C++, in place of the compiler's: for tests on machines without AMX. CMake includes
// this before the unit of amx_bf16 where RAGGED_EMULATE_AMX is set. Products are those of the instruction: of bfloat16,
// summed in float32.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Tiles {
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  uint32_t tile[8][16][16];
};
static_assert(sizeof(Tiles::Config) == 64, "as the instruction reads it");

inline Tiles& tiles() {
  static thread_local Tiles of_thread;
  return of_thread;
}
inline void load_config(const void* from) {
  Tiles& t = tiles();
  std::memcpy(&t.config, from, sizeof(t.config));
  std::memset(t.tile, 0, sizeof(t.tile));
  for (int i = 0; i < 8; ++i)
    if (t.config.palette != 1 || t.config.row_bytes[i] > 64 || t.config.rows[i] > 16) std::abort();
}
inline void release() { std::memset(&tiles(), 0, sizeof(Tiles)); }
inline void zero(int tile) { std::memset(tiles().tile[tile], 0, sizeof(tiles().tile[tile])); }
inline void load(int tile, const void* from, int64_t stride) {
  Tiles& t = tiles();
  zero(tile);
  for (int r = 0; r < t.config.rows[tile]; ++r)
    std::memcpy(t.tile[tile][r], static_cast<const char*>(from) + r * stride, t.config.row_bytes[tile]);
}
inline void store(int tile, void* to, int64_t stride) {
  const Tiles& t = tiles();
  for (int r = 0; r < t.config.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, t.tile[tile][r], t.config.row_bytes[tile]);
}
inline float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline void multiply(int to, int a, int b) {
  Tiles& t = tiles();
  const int pairs = t.config.row_bytes[a] / 4, columns = t.config.row_bytes[to] / 4;
  if (t.config.rows[to] != t.config.rows[a] || t.config.rows[b] != pairs || t.config.row_bytes[b] != columns * 4)
    std::abort();  // shapes that do not fit are an exception of the processor
  for (int r = 0; r < t.config.rows[to]; ++r)
    for (int c = 0; c < columns; ++c) {
      float sum = number(t.tile[to][r][c]);
      for (int k = 0; k < pairs; ++k) {
        const uint32_t x = t.tile[a][r][k], y = t.tile[b][k][c];
        sum += number(x << 16) * number(y << 16) + number(x & 0xffff0000u) * number(y & 0xffff0000u);
      }
      std::memcpy(&t.tile[to][r][c], &sum, sizeof(sum));
    }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated_amx::load_config(from)
#define _tile_release() emulated_amx::release()
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(to, a, b) emulated_amx::multiply(to, a, b)
