# The instruction sets that the kernels are compiled for: of each architecture, a later one is better.
#
# To add one, add a line here and the file src/isa/<name>.cc, which says whether a machine has it. All else is made from
# the line: the unit that compiles the kernels, its options, the table in isa.cc. The tests run every set that the machine
# has, and compare the list in docs/kernels.md with this one.
#
#               name         architecture  extends      options of the compiler, beside those of what it extends
instruction_set(baseline     x86_64        nothing)
instruction_set(avx2         x86_64        baseline     -mavx2 -mfma -mf16c)
instruction_set(avx512       x86_64        avx2         -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
instruction_set(avx512_bf16  x86_64        avx512       -mavx512bf16 -mavx512vbmi)
instruction_set(amx_bf16     x86_64        avx512_bf16  -mamx-tile -mamx-bf16)
instruction_set(neon         aarch64       nothing)
instruction_set(portable     other         nothing)
