"""`/v1/videos`: the page's engine in the form that OpenAI's client speaks, with the page's limits, queue and owners."""
