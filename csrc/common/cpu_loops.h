// Loops over the columns of a row, and templates chosen by run-time element types. For cpu_kernels.cpp files only.
#pragma once
#include "common/cpu_element.h"
#include "common/cpu_vector.h"

namespace convnext_kernels::CPU_CAPABILITY {

template <class T>
struct Tag {
  using type = T;
};

template <class F>
CK_INLINE void with_element(Element element, F f) {
  switch (element) {
    case Element::kFloat32:
      return f(Tag<float>{});
    case Element::kFloat64:
      return f(Tag<double>{});
    case Element::kFloat16:
      return f(Tag<float16>{});
    case Element::kBFloat16:
      return f(Tag<bfloat16>{});
  }
}

// The same for a second type that must share the accumulation type A with the first: fp64 meets only fp64.
template <class A, class F>
CK_INLINE void with_element_of(Element element, F f) {
  if constexpr (__is_same(A, double)) {
    f(Tag<double>{});
  } else {
    if (element == Element::kFloat32) f(Tag<float>{});
    if (element == Element::kFloat16) f(Tag<float16>{});
    if (element == Element::kBFloat16) f(Tag<bfloat16>{});
  }
}

// Both at once.
template <class F>
CK_INLINE void with_elements(Element first, Element second, F f) {
  with_element(first, [&](auto first_tag) {
    with_element_of<Accumulation<typename decltype(first_tag)::type>>(
        second, [&](auto second_tag) { f(first_tag, second_tag); });
  });
}

// How much of a vector exists: Whole, or the count of its first lanes.
struct Whole {};

template <class T>
CK_INLINE Vector<Accumulation<T>> load(const T* from, Whole) {
  return load(from);
}
template <class T>
CK_INLINE Vector<Accumulation<T>> load(const T* from, int count) {
  return load_partial(from, count);
}
template <class T>
CK_INLINE void store(T* to, Vector<Accumulation<T>> value, Whole) {
  store(to, value);
}
template <class T>
CK_INLINE void store(T* to, Vector<Accumulation<T>> value, int count) {
  store_partial(to, value, count);
}

// Zero in the lanes that do not exist.
template <class A>
CK_INLINE Vector<A> existing(Vector<A> value, Whole) {
  return value;
}
template <class A>
CK_INLINE Vector<A> existing(Vector<A> value, int count) {
  A lanes[kLanes<A>];
  store(lanes, value);
  return load_partial(lanes, count);
}

template <class A, class Part>
CK_INLINE void add_to(A* sum, Vector<A> value, Part part) {
  store(sum, load(sum, part) + value, part);
}

// The value as it will be read back from memory of type T.
template <class T>
CK_INLINE Vector<Accumulation<T>> rounded(Vector<Accumulation<T>> value) {
  if constexpr (sizeof(T) == sizeof(Accumulation<T>)) {
    return value;
  } else {
    T elements[kLanes<Accumulation<T>>];
    store(elements, value);
    return load(elements);
  }
}

// Calls f(column, part) for vector after vector of a row.
template <class A, class F>
CK_INLINE void for_columns(int64_t columns, F f) {
  int64_t column = 0;
  for (; column + kLanes<A> <= columns; column += kLanes<A>) f(column, Whole{});
  if (column < columns) f(column, static_cast<int>(columns - column));
}

}  // namespace convnext_kernels::CPU_CAPABILITY
