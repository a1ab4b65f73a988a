"""Write text token by token: the loop, the output head, the sampler, batches."""
