"""What a run writes down: JSONL, TensorBoard, terminal, plot."""
