"""A page to try models on: what it computes is here without Gradio, `page` is the Gradio around it."""
