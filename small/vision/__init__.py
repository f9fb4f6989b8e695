"""A Vision Transformer with NMDA activations: Kim et al. 2023, Appendix A.9 and Table S1.

python -m small.vision train      CIFAR-100 or TinyImageNet, an activation, three seeds
python -m small.vision tables     Table S1 of runs, with tests
"""
