// What the compiler calls: -fsanitize=thread before every load and store, -fsanitize=alignment,bounds where an address
// or an index is wrong. Defined here, so that no sanitizer's own library is needed.
#include <cstring>

#include "runtime.h"

namespace {

void on_access(const void* p, size_t bytes, int alignment, emu::Access access) {
  if (emu::machine.launch) emu::check_access(*emu::machine.current, p, static_cast<int>(bytes), alignment, access);
}

struct Mistake {  // the beginning of what the compiler tells about one
  const char* file;
  uint32_t line, column;
};

}  // namespace

#define SGL_HOOKS(bytes)                                                                                  \
  extern "C" void __tsan_read##bytes(const void* p) { on_access(p, bytes, bytes, emu::kRead); }           \
  extern "C" void __tsan_write##bytes(const void* p) { on_access(p, bytes, bytes, emu::kWrite); }         \
  extern "C" void __tsan_unaligned_read##bytes(const void* p) { on_access(p, bytes, bytes, emu::kRead); } \
  extern "C" void __tsan_unaligned_write##bytes(const void* p) { on_access(p, bytes, bytes, emu::kWrite); }

SGL_HOOKS(1)
SGL_HOOKS(2)
SGL_HOOKS(4)
SGL_HOOKS(8)
SGL_HOOKS(16)

extern "C" {

void __tsan_read_range(const void* p, size_t bytes) { on_access(p, bytes, 1, emu::kRead); }
void __tsan_write_range(const void* p, size_t bytes) { on_access(p, bytes, 1, emu::kWrite); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, 1, emu::kRead);
  on_access(to, bytes, 1, emu::kWrite);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  on_access(to, bytes, 1, emu::kWrite);
  return std::memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __ubsan_handle_type_mismatch_v1(const Mistake* where, const void* p) {
  emu::fail("misaligned access to %s (%s:%u)", emu::describe(p), where->file, where->line);
}
void __ubsan_handle_out_of_bounds(const Mistake* where, uintptr_t index) {
  emu::fail("index %td of a local array is out of bounds (%s:%u)", static_cast<ptrdiff_t>(index), where->file,
            where->line);
}

}  // extern "C"
