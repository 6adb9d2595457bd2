"""Small training steps of the block on a GPU, for compute-sanitizer: every mode, aligned and odd shapes."""

import torch

import test_gpu_block

# Whole vectors and single elements, several images a block, kernels of version 1 and plain ones.
SHAPES = [(3, 32, 14, 14), (5, 16, 7, 7), (2, 12, 9, 5), (1, 8, 1, 58)]


def main():
    torch.manual_seed(0)
    for mode in test_gpu_block.MODES:
        for use_grn in (False, True):
            for shape in SHAPES:
                for result in test_gpu_block.Step(mode, use_grn, shape, dropped=shape[0] > 1).run():
                    assert result.isfinite().all(), (mode, use_grn, shape)
    torch.cuda.synchronize()
    print("small steps done")


if __name__ == "__main__":
    main()
