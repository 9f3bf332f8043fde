package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func serve(path string) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	server.RegisterService(service, &ttrpc.ServiceDesc{
		Methods: map[string]ttrpc.Method{
			"Echo":     unary(echo),
			"Bytes":    unary(sameBytes),
			"Fail":     unary(fail),
			"Wait":     unary(wait),
			"Metadata": unary(metadata),
		},
		Streams: map[string]ttrpc.Stream{
			"Repeat": {Handler: repeat, StreamingClient: true, StreamingServer: true},
			"Count":  {Handler: count, StreamingServer: true},
			"Join":   {Handler: join, StreamingClient: true},
		},
	})
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	fmt.Println("listening")
	if err := server.Serve(context.Background(), listener); !errors.Is(err, ttrpc.ErrServerClosed) {
		return err
	}
	return nil
}

func unary[Request any](handler func(context.Context, *Request) (any, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		request := new(Request)
		if err := unmarshal(request); err != nil {
			return nil, err
		}
		return handler(ctx, request)
	}
}

func echo(_ context.Context, request *wrapperspb.StringValue) (any, error) {
	return request, nil
}

func sameBytes(_ context.Context, request *wrapperspb.BytesValue) (any, error) {
	return request, nil
}

func fail(_ context.Context, request *wrapperspb.Int32Value) (any, error) {
	if request.Value < 0 {
		return nil, errors.New("an error without a code")
	}
	return nil, status.Errorf(codes.Code(request.Value), "asked for %d", request.Value)
}

func wait(ctx context.Context, _ *emptypb.Empty) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func metadata(ctx context.Context, request *wrapperspb.StringValue) (any, error) {
	all, _ := ttrpc.GetMetadata(ctx)
	values, _ := all.Get(request.Value)
	return wrapperspb.String(strings.Join(values, ",")), nil
}

func repeat(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	for {
		var message wrapperspb.StringValue
		if err := stream.RecvMsg(&message); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return nil, err
		}
		if err := stream.SendMsg(&message); err != nil {
			return nil, err
		}
	}
}

// count sends 1 to n; a negative n ends with an error after -n messages.
func count(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	var request wrapperspb.Int32Value
	if err := stream.RecvMsg(&request); err != nil {
		return nil, err
	}
	last := request.Value
	if last < 0 {
		last = -last
	}
	for i := int32(1); i <= last; i++ {
		if err := stream.SendMsg(wrapperspb.Int32(i)); err != nil {
			return nil, err
		}
	}
	if request.Value < 0 {
		return nil, status.Error(codes.FailedPrecondition, "below zero")
	}
	return nil, nil
}

func join(_ context.Context, stream ttrpc.StreamServer) (any, error) {
	var texts []string
	for {
		var message wrapperspb.StringValue
		if err := stream.RecvMsg(&message); err != nil {
			if errors.Is(err, io.EOF) {
				return wrapperspb.String(strings.Join(texts, ",")), nil
			}
			return nil, err
		}
		texts = append(texts, message.Value)
	}
}
