"""What a user holds: ServiceClient, TrainingClient, SamplingClient, RestClient and the futures they return."""
