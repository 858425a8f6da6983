"""What does a user hold? A ServiceClient, training and sampling clients, a RestClient, and the futures they return."""
