"""A kernel for easydel-ragged-plugin and an operation for EasyDeL; importing the package imports neither."""
