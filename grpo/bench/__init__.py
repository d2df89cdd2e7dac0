"""What the speed claims of docs/performance.md rest on: `make bench`, and `make bench-gpu` at the true 7B shapes."""
