"""The SDKs by which a service is reached: what differs between them, and their types and errors in terms of ours."""
