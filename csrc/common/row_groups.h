// How the CPU operators share out rows. Plain functions of the shape: the number of threads plays no part, so that sums
// over rows have one order.
#pragma once
#include <algorithm>
#include <cstdint>

namespace convnext_kernels {

// A group is one task, and one partial sum of whatever is summed over rows.
constexpr int64_t kWantedGroups = 64;
constexpr int64_t kMinGroupRows = 16;   // fewer, and the partial sums cost more than the rows
constexpr int64_t kMaxGroupRows = 256;  // more, and a sum in one sweep rounds noticeably

constexpr int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// `rows` in blocks of block_rows (the last may be shorter), each divided into groups: none spans two blocks.
struct RowGroups {
  int64_t rows = 0, block_rows = 1, group_rows = 1, groups_per_block = 0, count = 0;

  int64_t first_row(int64_t group) const {
    return std::min(rows, group / groups_per_block * block_rows + group % groups_per_block * group_rows);
  }
  int64_t end_row(int64_t group) const {
    const int64_t block_end = (group / groups_per_block + 1) * block_rows;
    return std::min(
        {rows, block_end, group / groups_per_block * block_rows + (group % groups_per_block + 1) * group_rows});
  }
};

inline RowGroups row_groups(int64_t rows, int64_t block_rows) {
  RowGroups groups;
  if (rows == 0) return groups;
  groups.rows = rows;
  groups.block_rows = std::min(block_rows, rows);
  const int64_t wanted = std::clamp(ceil_divide(rows, kWantedGroups), kMinGroupRows, kMaxGroupRows);
  groups.groups_per_block = ceil_divide(groups.block_rows, wanted);
  groups.group_rows = ceil_divide(groups.block_rows, groups.groups_per_block);
  groups.groups_per_block = ceil_divide(groups.block_rows, groups.group_rows);
  groups.count = ceil_divide(rows, groups.block_rows) * groups.groups_per_block;
  return groups;
}

inline RowGroups row_groups(int64_t rows) {
  return row_groups(rows, std::max<int64_t>(rows, 1));
}

}  // namespace convnext_kernels
