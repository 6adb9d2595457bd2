// Rows of pixels between tensors and the kernels' scratch memory. Part of cpu_kernels.cpp, the only file to include it:
// see there, and common/cpu_vector.h on why everything is in the capability's namespace.
#pragma once
#include "common/cpu_loops.h"
#include "common/cpu_vector.h"

namespace convnext_kernels::CPU_CAPABILITY {
namespace {

CK_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
CK_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// --- between tensors and scratch: `pixels` vectors, a tensor's `channels` apart, of which `lanes` lanes exist
// The vectors of a row are too far apart for the processor to foresee, so those of the next row, `ahead` elements on,
// are asked for now.
template <class T, class A>
void load_row_as(const void* tensor, int64_t offset, int64_t ahead, int64_t channels, int64_t lanes, int64_t pixels,
                 A* to) {
  const T* from = static_cast<const T*>(tensor) + offset;
  if (lanes == kLanes<A>) {
    for (int64_t i = 0; i < pixels; ++i, from += channels, to += kLanes<A>) {
      __builtin_prefetch(from + ahead);
      store(to, load(from));
    }
  } else {
    for (int64_t i = 0; i < pixels; ++i, from += channels, to += kLanes<A>) {
      __builtin_prefetch(from + ahead);
      store(to, load_partial(from, static_cast<int>(lanes)));
    }
  }
}

template <class A>
void load_row(Element type, const void* tensor, int64_t offset, int64_t ahead, int64_t channels, int64_t lanes,
              int64_t pixels, A* to) {
  with_element_of<A>(type, [&](auto tag) {
    load_row_as<typename decltype(tag)::type>(tensor, offset, ahead, channels, lanes, pixels, to);
  });
}

template <class T, class A>
void store_row_as(const A* from, const void* residual, void* result, int64_t offset, int64_t channels, int64_t lanes,
                  int64_t pixels) {
  T* to = static_cast<T*>(result) + offset;
  const T* addend = residual ? static_cast<const T*>(residual) + offset : nullptr;
  const int count = static_cast<int>(lanes);
  if (lanes == kLanes<A>) {
    if (addend) {
      for (int64_t i = 0; i < pixels; ++i)
        store(to + i * channels, load(from + i * kLanes<A>) + load(addend + i * channels));
    } else {
      for (int64_t i = 0; i < pixels; ++i) store(to + i * channels, load(from + i * kLanes<A>));
    }
  } else {
    for (int64_t i = 0; i < pixels; ++i) {
      Vector<A> value = load(from + i * kLanes<A>);
      if (addend) value += load_partial(addend + i * channels, count);
      store_partial(to + i * channels, value, count);
    }
  }
}

template <class A>
void store_row(Element type, const A* from, const void* residual, void* result, int64_t offset, int64_t channels,
               int64_t lanes, int64_t pixels) {
  with_element_of<A>(type, [&](auto tag) {
    store_row_as<typename decltype(tag)::type>(from, residual, result, offset, channels, lanes, pixels);
  });
}

// --- the ring of source rows in scratch: row r is at slot r % kernel_size, and column 0 of it is column `origin` of
// the image. Columns outside the image are zero.
template <class A>
struct Ring {
  A* rows;
  int64_t slots, columns, origin;
  int64_t first_valid, valid;  // the columns of a slot that lie in the image

  Ring(void* scratch, int64_t slots, int64_t columns, int64_t origin, int64_t width)
      : rows(static_cast<A*>(scratch)), slots(slots), columns(columns), origin(origin) {
    first_valid = larger(0, -origin);
    valid = larger(0, smaller(width - origin, columns) - first_valid);
    for (int64_t slot = 0; slot < slots; ++slot) {
      A* to = rows + slot * columns * kLanes<A>;
      for (int64_t i = 0; i < first_valid; ++i) store(to + i * kLanes<A>, Vector<A>{});
      for (int64_t i = first_valid + valid; i < columns; ++i) store(to + i * kLanes<A>, Vector<A>{});
    }
  }

  A* end() const { return rows + slots * columns * kLanes<A>; }
  A* row(int64_t index) const { return rows + index % slots * columns * kLanes<A>; }
  A* after(A* row) const {
    A* const next = row + columns * kLanes<A>;
    return next == end() ? rows : next;
  }

  // image_row: the offset in elements of the row's column 0.
  void fill(int64_t index, Element type, const void* tensor, int64_t image_row, int64_t width, int64_t channels,
            int64_t lanes) const {
    load_row(type, tensor, image_row + (origin + first_valid) * channels, width * channels, channels, lanes, valid,
             row(index) + first_valid * kLanes<A>);
  }
};

}  // namespace
}  // namespace convnext_kernels::CPU_CAPABILITY
