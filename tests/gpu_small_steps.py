"""Small training steps of the block on a GPU, for compute-sanitizer: every mode, aligned and odd shapes, by the CUDA
kernels; and the Triton kernels, which compile for seconds in each mode and width, in two modes on one shape.
"""

import torch

import convnext_kernels as ck
import test_gpu_block

# Whole vectors and single elements, several images a block, kernels of version 1 and plain ones.
SHAPES = [(3, 32, 14, 14), (5, 16, 7, 7), (2, 12, 9, 5), (1, 8, 1, 58)]


TRITON_MODES = ("bf16", "autocast-bf16")


def main():
    torch.manual_seed(0)
    for backend, modes, shapes in (("cuda", test_gpu_block.MODES, SHAPES), ("triton", TRITON_MODES, SHAPES[:1])):
        for mode in modes:
            for use_grn in (False, True):
                for shape in shapes:
                    with ck.use_backend(backend):
                        results = test_gpu_block.Step(mode, use_grn, shape, dropped=shape[0] > 1).run()
                    for result in results:
                        assert result.isfinite().all(), (backend, mode, use_grn, shape)
    torch.cuda.synchronize()
    print("small steps done")


if __name__ == "__main__":
    main()
