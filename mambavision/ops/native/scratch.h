// Working memory of a thread, kept from call to call so that no step faults in fresh pages.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace mambavision {

class Scratch {
 public:
  // Points each pointer to room for so many elements, aligned to a cache line: reserve(a, 100, b, 200). One Scratch at a
  // time in a thread; contents are whatever was there.
  template <class... Arguments>
  void reserve(Arguments&&... arguments) {
    std::size_t bytes = 0;
    place(nullptr, bytes, arguments...);
    char* base = memory(bytes);
    bytes = 0;
    place(base, bytes, arguments...);
  }

 private:
  static void place(char*, std::size_t&) {}
  template <class T, class Count, class... Rest>
  static void place(char* base, std::size_t& used, T*& pointer, Count count, Rest&&... rest) {
    pointer = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(base) + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    place(base, used, rest...);
  }

  static char* memory(std::size_t bytes) {
    struct Kept {
      char* data = nullptr;
      std::size_t bytes = 0;
      ~Kept() { std::free(data); }
    };
    static thread_local Kept kept;
    if (kept.bytes < bytes) {
      std::free(kept.data);
      kept.bytes = (bytes + 4095) / 4096 * 4096;
      kept.data = static_cast<char*>(std::aligned_alloc(4096, kept.bytes));
      if (kept.data == nullptr) throw std::bad_alloc();
    }
    return kept.data;
  }
};

}  // namespace mambavision
