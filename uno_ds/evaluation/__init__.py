"""From a checkpoint to the numbers of public benchmarks: images, answers of judges, scores,
reports."""
