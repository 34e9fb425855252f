"""What benchmarks that live elsewhere are given: videos for VBench, captions for DREAM-1K and VDC."""
