"""An H200 SXM, from NVIDIA's data sheet (dense products) and the tuning guide for compute capability 9.0."""

MULTIPROCESSORS = 132
MEMORY = 4.8e12  # bytes a second
LATENCY = 0.7e-6  # of memory, assumed
# a second; of tensor cores in fp16, bf16 and tf32, of layers in fp64 too
FLOPS = {"fp16": 989e12, "bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "fp64": 34e12, "fp64 tensor": 67e12}
INSTRUCTIONS = FLOPS["fp32"] / 64  # of warps, a second: as many as products with a sum, 64 flops of 32 threads

# of a multiprocessor
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 233472, 64, 32
RESERVED = 1024  # bytes of shared memory, for each block
