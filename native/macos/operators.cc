// For macOS, linked by zig: allocation that no other library sees. zig links the C++ runtime in, whose operators are
// exported, and its linker knows no list of exported names. Those that an object defines itself can be private; with
// all of them here the runtime's are not linked. Apple's linker takes the list, and needs none of this.
#include <cstdlib>
#include <new>

namespace {

void* find_memory(std::size_t bytes, std::size_t alignment) noexcept {
  if (bytes == 0) bytes = 1;
  if (alignment <= alignof(std::max_align_t)) return std::malloc(bytes);
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
  return whole < bytes ? nullptr : std::aligned_alloc(alignment, whole);
}

void* allocate(std::size_t bytes, std::size_t alignment = 0) {
  for (;;) {
    if (void* memory = find_memory(bytes, alignment)) return memory;
    const std::new_handler handler = std::get_new_handler();
    if (handler == nullptr) throw std::bad_alloc();
    handler();
  }
}

void* allocate_or_null(std::size_t bytes, std::size_t alignment = 0) noexcept {
  try {
    return allocate(bytes, alignment);
  } catch (...) {
    return nullptr;
  }
}

}  // namespace

// The operators in their forms for one object and for an array: `name` is that of the C++ ABI, `size_t` is m there.
#define RAGGED_PRIVATE(name) asm(".private_extern __Z" #name)

#define RAGGED_NEW(form, letters)                                                                                \
  void* operator new form(std::size_t bytes) { return allocate(bytes); }                                         \
  void* operator new form(std::size_t bytes, std::align_val_t alignment) {                                       \
    return allocate(bytes, std::size_t(alignment));                                                              \
  }                                                                                                              \
  void* operator new form(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate_or_null(bytes); } \
  void* operator new form(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {       \
    return allocate_or_null(bytes, std::size_t(alignment));                                                      \
  }                                                                                                              \
  RAGGED_PRIVATE(letters##m);                                                                                    \
  RAGGED_PRIVATE(letters##mSt11align_val_t);                                                                     \
  RAGGED_PRIVATE(letters##mRKSt9nothrow_t);                                                                      \
  RAGGED_PRIVATE(letters##mSt11align_val_tRKSt9nothrow_t)

#define RAGGED_DELETE(form, letters)                                                                               \
  void operator delete form(void* memory) noexcept { std::free(memory); }                                          \
  void operator delete form(void* memory, std::size_t) noexcept { std::free(memory); }                             \
  void operator delete form(void* memory, std::align_val_t) noexcept { std::free(memory); }                        \
  void operator delete form(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }           \
  void operator delete form(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }                   \
  void operator delete form(void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); } \
  RAGGED_PRIVATE(letters##Pv);                                                                                     \
  RAGGED_PRIVATE(letters##Pvm);                                                                                    \
  RAGGED_PRIVATE(letters##PvSt11align_val_t);                                                                      \
  RAGGED_PRIVATE(letters##PvmSt11align_val_t);                                                                     \
  RAGGED_PRIVATE(letters##PvRKSt9nothrow_t);                                                                       \
  RAGGED_PRIVATE(letters##PvSt11align_val_tRKSt9nothrow_t)

#define RAGGED_ONE
RAGGED_NEW(RAGGED_ONE, nw);
RAGGED_NEW([], na);
RAGGED_DELETE(RAGGED_ONE, dl);
RAGGED_DELETE([], da);
