"""What stands between the network and Gradio: which sites may speak, how much, how fast. Knows nothing of jobs."""
