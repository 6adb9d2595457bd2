// What the test programs share: options, reproducible numbers, comparison with double, the four schedules.
//
// A program runs one case a call: `program CASE key=value ...`. It prints what it found and exits with 0 only if every
// schedule gave right results, bit for bit the same, without an error of the engine or a report of the race hooks.
#pragma once
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/machine.cuh"
#include "race_hooks.h"

namespace harness {

using convnext_kernels::Accumulation;

class Options {
 public:
  Options(int argc, char** argv) {
    for (int i = 2; i < argc; ++i) {
      const std::string option = argv[i];
      const size_t equals = option.find('=');
      if (equals == std::string::npos) throw std::runtime_error("not key=value: " + option);
      values_[option.substr(0, equals)] = option.substr(equals + 1);
    }
  }
  std::string text(const std::string& key) const {
    const auto found = values_.find(key);
    if (found == values_.end()) throw std::runtime_error("missing option: " + key);
    return found->second;
  }
  int64_t number(const std::string& key) const { return std::stoll(text(key)); }

 private:
  std::map<std::string, std::string> values_;
};

// Calls function(element) with a zero of the type that is named.
template <class Function>
auto with_type(const std::string& name, Function&& function) {
  if (name == "float") return function(float{});
  if (name == "double") return function(double{});
  if (name == "half") return function(__half{});
  if (name == "bfloat16") return function(__nv_bfloat16{});
  throw std::runtime_error("unknown type: " + name);
}

template <class T>
double to_double(T value) {
  return static_cast<double>(convnext_kernels::to_accumulation(value));
}

template <class T>
T from_double(double value) {
  return convnext_kernels::from_accumulation<T>(static_cast<Accumulation<T>>(value));
}

// Half the distance between neighbouring values of type T around `value`: the error of correct rounding.
template <class T>
double half_ulp(double value) {
  const auto of = [&](int digits, int least_exponent) {
    const int exponent = value == 0 ? least_exponent : std::max(std::ilogb(value), least_exponent);
    return std::ldexp(1.0, exponent - digits);
  };
  if constexpr (std::is_same_v<T, __half>) return of(11, -14);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return of(8, -126);
  if constexpr (std::is_same_v<T, float>) return of(24, -126);
  return of(53, -1022);
}

template <class T>
void fill_normal(emu::Buffer<T>& buffer, unsigned seed, double scale) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, scale);
  for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = from_double<T>(normal(random));
}

// What one schedule left behind.
class Outcome {
 public:
  // NaN is never near anything, except where NaN is expected.
  void check(const char* name, size_t index, double got, double expected, double tolerance) {
    if (std::fabs(got - expected) <= tolerance || (std::isnan(got) && std::isnan(expected))) return;
    if (wrong_++ == 0) {
      char line[200];
      std::snprintf(line, sizeof(line), "%s[%zu]: expected %.9g, got %.9g, allowed error %.3g", name, index, expected,
                    got, tolerance);
      first_wrong_ = line;
    }
  }
  template <class T>
  void keep(emu::Buffer<T>& buffer) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(buffer.data());
    bits_.insert(bits_.end(), bytes, bytes + buffer.size() * sizeof(T));
  }
  bool right() const { return wrong_ == 0; }
  std::string describe() const { return std::to_string(wrong_) + " wrong values, first " + first_wrong_; }
  const std::vector<unsigned char>& bits() const { return bits_; }

 private:
  size_t wrong_ = 0;
  std::string first_wrong_;
  std::vector<unsigned char> bits_;
};

// Runs `body` in the four schedules; 0 if all went well and alike.
inline int run_schedules(const std::function<Outcome()>& body) {
  struct Schedule {
    const char* name;
    emu::Order order;
    bool greedy;
  };
  constexpr Schedule kSchedules[] = {{"forward", emu::Order::kForward, false},
                                     {"reverse", emu::Order::kReverse, false},
                                     {"random", emu::Order::kRandom, false},
                                     {"greedy", emu::Order::kRandom, true}};
  int failures = 0;
  std::vector<unsigned char> first;
  for (const Schedule& schedule : kSchedules) {
    emu::config().order = schedule.order;
    emu::config().greedy = schedule.greedy;
    try {
      const Outcome outcome = body();
      if (!outcome.right()) {
        ++failures;
        std::printf("%s schedule: %s\n", schedule.name, outcome.describe().c_str());
      }
      if (&schedule == kSchedules) first = outcome.bits();
      if (outcome.bits() != first) {
        ++failures;
        std::printf("%s schedule: not the same bits as the forward schedule\n", schedule.name);
      }
    } catch (const emu::Error& error) {
      ++failures;
      std::printf("%s schedule: %s\n", schedule.name, error.what());
    }
  }
  for (const std::string& line : emu::race::take_reports()) {
    ++failures;
    std::printf("%s\n", line.c_str());
  }
  return failures == 0 ? 0 : 1;
}

using Case = int (*)(const Options&);

inline int main_of(int argc, char** argv, const std::map<std::string, Case>& cases) {
  if (argc < 2 || !cases.count(argv[1])) {
    std::fprintf(stderr, "usage: %s CASE key=value ...\n", argv[0]);
    return 2;
  }
  try {
    return cases.at(argv[1])(Options(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

}  // namespace harness
