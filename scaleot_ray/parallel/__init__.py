"""Groups of workers on Ray that train under DeepSpeed."""
