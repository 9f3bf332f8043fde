package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const maxPayload = 4 << 20

var (
	both       = &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}
	serverOnly = &ttrpc.StreamDesc{StreamingServer: true}
	clientOnly = &ttrpc.StreamDesc{StreamingClient: true}
)

var checks = map[string]func(context.Context, *ttrpc.Client) error{
	"unary":           checkUnary,
	"empty":           checkEmpty,
	"largest":         checkLargest,
	"oversize":        checkOversize,
	"codes":           checkCodes,
	"unknown":         checkUnknown,
	"timeout":         checkTimeout,
	"metadata":        checkMetadata,
	"concurrent":      checkConcurrent,
	"stream-both":     checkStreamBoth,
	"stream-many":     checkStreamMany,
	"stream-server":   checkStreamServer,
	"stream-error":    checkStreamError,
	"stream-client":   checkStreamClient,
	"leave-with-wait": checkLeave,
}

func check(path, name string) error {
	run, ok := checks[name]
	if !ok {
		return fmt.Errorf("there is no check %q", name)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	return run(ctx, client)
}

func callEcho(ctx context.Context, client *ttrpc.Client, text string) error {
	var response wrapperspb.StringValue
	if err := client.Call(ctx, service, "Echo", wrapperspb.String(text), &response); err != nil {
		return err
	}
	if response.Value != text {
		return fmt.Errorf("%q came back as %q", text, response.Value)
	}
	return nil
}

func checkUnary(ctx context.Context, client *ttrpc.Client) error {
	return callEcho(ctx, client, "hello")
}

func checkEmpty(ctx context.Context, client *ttrpc.Client) error {
	return callEcho(ctx, client, "")
}

// checkLargest fills a request to the last byte that the protocol allows.
func checkLargest(ctx context.Context, client *ttrpc.Client) error {
	deadline, _ := ctx.Deadline()
	envelope := &ttrpc.Request{Service: service, Method: "Bytes", TimeoutNano: time.Until(deadline).Nanoseconds()}
	size := maxPayload - proto.Size(envelope) - 2*(1+4) // twice a tag and a length of 4 bytes
	value := bytes.Repeat([]byte{7, 0, 255}, maxPayload)[:size]
	var response wrapperspb.BytesValue
	if err := client.Call(ctx, service, "Bytes", wrapperspb.Bytes(value), &response); err != nil {
		return err
	}
	if !bytes.Equal(value, response.Value) {
		return errors.New("other bytes came back")
	}
	return nil
}

// checkOversize asks for an answer that exceeds the limit: the server must say so and go on.
func checkOversize(ctx context.Context, client *ttrpc.Client) error {
	err := client.Call(ctx, service, "Double", wrapperspb.Bytes(make([]byte, maxPayload*3/4)), &wrapperspb.BytesValue{})
	if err := expectCode(err, codes.ResourceExhausted); err != nil {
		return err
	}
	return callEcho(ctx, client, "still there")
}

func checkCodes(ctx context.Context, client *ttrpc.Client) error {
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		err := client.Call(ctx, service, "Fail", wrapperspb.Int32(int32(code)), &emptypb.Empty{})
		if err := expectCode(err, code); err != nil {
			return err
		}
		if want := fmt.Sprintf("asked for %d", code); status.Convert(err).Message() != want {
			return fmt.Errorf("message %q instead of %q", status.Convert(err).Message(), want)
		}
	}
	return expectCode(client.Call(ctx, service, "Fail", wrapperspb.Int32(-1), &emptypb.Empty{}), codes.Unknown)
}

func checkUnknown(ctx context.Context, client *ttrpc.Client) error {
	err := client.Call(ctx, service, "Missing", &emptypb.Empty{}, &emptypb.Empty{})
	if err := expectCode(err, codes.Unimplemented); err != nil {
		return err
	}
	err = client.Call(ctx, "interop.Missing", "Echo", &emptypb.Empty{}, &emptypb.Empty{})
	return expectCode(err, codes.Unimplemented)
}

// checkTimeout leaves a call to its deadline; the test sees that the server's handler ended as well.
func checkTimeout(ctx context.Context, client *ttrpc.Client) error {
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	err := client.Call(short, service, "Wait", &emptypb.Empty{}, &emptypb.Empty{})
	if err == nil {
		return errors.New("Wait returned before its deadline")
	}
	return callEcho(ctx, client, "still there")
}

func checkMetadata(ctx context.Context, client *ttrpc.Client) error {
	all := ttrpc.MD{}
	all.Set("key", "a", "b")
	var response wrapperspb.StringValue
	ctx = ttrpc.WithMetadata(ctx, all)
	if err := client.Call(ctx, service, "Metadata", wrapperspb.String("key"), &response); err != nil {
		return err
	}
	if response.Value != "a,b" {
		return fmt.Errorf("the server saw %q", response.Value)
	}
	return nil
}

func checkConcurrent(ctx context.Context, client *ttrpc.Client) error {
	return inParallel(100, func(i int) error {
		for j := 0; j < 20; j++ {
			if err := callEcho(ctx, client, fmt.Sprintf("call %d.%d", i, j)); err != nil {
				return err
			}
		}
		return nil
	})
}

func checkStreamBoth(ctx context.Context, client *ttrpc.Client) error {
	return pingPong(ctx, client, 300)
}

func checkStreamMany(ctx context.Context, client *ttrpc.Client) error {
	return inParallel(20, func(int) error { return pingPong(ctx, client, 100) })
}

func pingPong(ctx context.Context, client *ttrpc.Client, rounds int) error {
	stream, err := client.NewStream(ctx, both, service, "Repeat", nil)
	if err != nil {
		return err
	}
	for i := 0; i < rounds; i++ {
		text := ""
		if i > 0 { // the first message is empty
			text = strconv.Itoa(i)
		}
		if err := stream.SendMsg(wrapperspb.String(text)); err != nil {
			return err
		}
		var message wrapperspb.StringValue
		if err := stream.RecvMsg(&message); err != nil {
			return err
		}
		if message.Value != text {
			return fmt.Errorf("%q came back as %q", text, message.Value)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return expectEnd(stream)
}

func checkStreamServer(ctx context.Context, client *ttrpc.Client) error {
	for _, n := range []int32{1000, 1, 0} {
		stream, err := client.NewStream(ctx, serverOnly, service, "Count", wrapperspb.Int32(n))
		if err != nil {
			return err
		}
		if err := expectNumbers(stream, n); err != nil {
			return err
		}
		if err := expectEnd(stream); err != nil {
			return err
		}
	}
	return nil
}

func checkStreamError(ctx context.Context, client *ttrpc.Client) error {
	stream, err := client.NewStream(ctx, serverOnly, service, "Count", wrapperspb.Int32(-5))
	if err != nil {
		return err
	}
	if err := expectNumbers(stream, 5); err != nil {
		return err
	}
	return expectCode(stream.RecvMsg(&wrapperspb.Int32Value{}), codes.FailedPrecondition)
}

func checkStreamClient(ctx context.Context, client *ttrpc.Client) error {
	stream, err := client.NewStream(ctx, clientOnly, service, "Join", nil)
	if err != nil {
		return err
	}
	for _, text := range []string{"a", "", "c"} {
		if err := stream.SendMsg(wrapperspb.String(text)); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	var response wrapperspb.StringValue
	if err := stream.RecvMsg(&response); err != nil {
		return err
	}
	if response.Value != "a,,c" {
		return fmt.Errorf("the answer is %q", response.Value)
	}
	return nil
}

// checkLeave goes away while a call is under way.
func checkLeave(ctx context.Context, client *ttrpc.Client) error {
	go func() { _ = client.Call(ctx, service, "Wait", &emptypb.Empty{}, &emptypb.Empty{}) }()
	time.Sleep(200 * time.Millisecond)
	return callEcho(ctx, client, "bye")
}

func expectNumbers(stream ttrpc.ClientStream, n int32) error {
	for i := int32(1); i <= n; i++ {
		var message wrapperspb.Int32Value
		if err := stream.RecvMsg(&message); err != nil {
			return fmt.Errorf("instead of %d: %w", i, err)
		}
		if message.Value != i {
			return fmt.Errorf("%d instead of %d", message.Value, i)
		}
	}
	return nil
}

func expectEnd(stream ttrpc.ClientStream) error {
	if err := stream.RecvMsg(&emptypb.Empty{}); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%v instead of the end of the stream", err)
	}
	return nil
}

func expectCode(err error, code codes.Code) error {
	if status.Code(err) != code {
		return fmt.Errorf("%v instead of code %v", err, code)
	}
	return nil
}

func inParallel(n int, work func(int) error) error {
	var group sync.WaitGroup
	failures := make(chan error, n)
	for i := 0; i < n; i++ {
		group.Add(1)
		go func(i int) {
			defer group.Done()
			failures <- work(i)
		}(i)
	}
	group.Wait()
	close(failures)
	for err := range failures {
		if err != nil {
			return err
		}
	}
	return nil
}
